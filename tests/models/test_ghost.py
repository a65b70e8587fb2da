import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy_reference import conv_bn, parameters
from randomize import apply, randomized

from slimconv_jax import backbone, count_macs, count_params, fold_batch_norm, save_model
from slimconv_jax.models.ghost import GhostConvBN
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.storage.model_directory import load_model


@pytest.mark.parametrize(("kernel_size", "strides"), [(1, 1), (3, 2), (1, 2)])
def test_half_of_the_channels_are_computed_from_the_others(kernel_size, strides):
    def build():
        return GhostConvBN(5, 6, kernel_size, strides=strides, rngs=nnx.Rngs(0))

    module = randomized(build)
    module.eval()
    x = np.random.default_rng(0).normal(size=(2, 7, 8, 5))
    p = parameters(module)
    first = conv_bn(x, p["primary"], strides=strides)
    second = conv_bn(first, p["cheap"], groups=3)
    y = apply(module, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, np.concatenate([first, second], -1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(apply(fold_batch_norm(module), x.astype(np.float32)), y, atol=1e-4)


def test_the_network_has_the_published_counts():
    model = abstract_model("ghost_resnet50")
    assert (count_params(model), count_macs(model)) == (13_953_512, 2_151_023_360)


@pytest.mark.long
def test_it_is_saved_and_loaded(tmp_path):
    settings = {"width": 16, "num_classes": 3, "stem": "cifar"}
    model = randomized(lambda: abstract_model("ghost_resnet50", **settings))
    save_model(model, tmp_path / "ghost")
    loaded = load_model(tmp_path / "ghost")
    assert loaded.config == model.config
    scale = loaded.stages[3][2].conv3.cheap.bn.scale[...]
    np.testing.assert_array_equal(scale, model.stages[3][2].conv3.cheap.bn.scale[...])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GhostConvBN(4, 7, 1, rngs=nnx.Rngs(0)), "their number must be even, not 7"),
        (
            lambda: abstract_model("ghost_resnet50", width=3),
            "^ghost_resnet50: .* must be even, not 3",
        ),
        (lambda: abstract_model("ghost_resnet50", k=2), "ghost_resnet50 has no SlimConv"),
        (lambda: ResNetConfig((1, 1, 1, 1), block="ghost", reduction=2), "a ghost block has no Sl"),
        (
            lambda: backbone(abstract_model("ghost_resnet50"), output_stride=16),
            "ghost modules take neither dilation nor groups",
        ),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
