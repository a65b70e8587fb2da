"""fold_batch_norm and backbone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from randomize import apply, randomized
from someone_elses import VGG

import slimconv_jax as sc
from slimconv_jax.models.layers import ConvBN
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.models.zoo import ARCHITECTURES, abstract_model, abstract_resnet


def arrays(model):
    return {path: np.array(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def vgg():
    return VGG(rngs=nnx.Rngs(0))


def compare_folded(model, size, tolerance=1e-5):
    model.eval()
    folded = sc.fold_batch_norm(model)
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    expected = np.asarray(apply(model, x))
    assert np.abs(apply(folded, x) - expected).max() <= tolerance * np.abs(expected).max()
    assert not nnx.state(folded, nnx.BatchStat)
    return model, folded


def small_sc():
    groups = {"groups": 2, "base_width": 32, "reduction": 3, "lower_groups": 1}
    return abstract_resnet(ResNetConfig((1, 1, 1, 1), width=12, **groups))


def small_slimified():
    """Basic blocks, where SlimConv and a 1x1 convolution stand before a batch norm."""
    config = ResNetConfig((1, 1, 1, 1), block="basic", width=8, stem="cifar")
    return sc.slimify(abstract_resnet(config))[0]


def small_ungated():
    """Squeeze-and-excitation, which has no batch norm, and no gate."""
    se = {"block": "se", "stem": "cifar", "num_classes": 3}
    return abstract_resnet(ResNetConfig((1, 1, 1, 1), width=8, reduction=2, gating=None, **se))


@pytest.mark.parametrize(
    "build",
    [
        small_sc,
        *(pytest.param(b, marks=pytest.mark.long) for b in (small_slimified, small_ungated)),
    ],
)
def test_folding_batch_norm_changes_nothing_but_its_presence(build):
    model = randomized(build)
    before = arrays(model)
    model, folded = compare_folded(model, 32)
    assert all(np.array_equal(before[path], value) for path, value in arrays(model).items())
    x = jnp.zeros((1, 32, 32, 3))
    for net, count in ((model, True), (folded, False)):
        program = nnx.jit(lambda m, x: m(x)).lower(net, x).as_text()
        assert ("rsqrt" in program) == count  # of batch norm alone
    assert not any(isinstance(module, ConvBN) for _, module in nnx.iter_modules(folded))


def test_folded_kernels_have_the_dtype_of_the_computation_and_give_the_same_bits():
    config = small_sc().config
    single, half = (
        sc.fold_batch_norm(randomized(lambda dtype=dtype: abstract_resnet(config, dtype=dtype)))
        for dtype in (None, "bfloat16")
    )
    for path, value in arrays(half).items():
        whole = {"excite", "classifier"} & set(path)  # have no batch norm after them
        assert value.dtype == (jnp.float32 if whole else jnp.bfloat16), path
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    rounded_at_use = nnx.merge(nnx.graphdef(half), nnx.state(single))
    np.testing.assert_array_equal(apply(half, x), apply(rounded_at_use, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_member_of_the_family_folds(name):
    model = randomized(lambda: abstract_model(name))
    for stage in model.stages:
        for block in stage:
            last = block.conv3 if hasattr(block, "conv3") else block.conv2
            for _, bn in nnx.iter_modules(last):
                if isinstance(bn, nnx.BatchNorm):  # as deep trained networks have it
                    bn.scale.set_value(0.3 * bn.scale[...])
    compare_folded(model, 64)


class Several(nnx.Module):
    """Adds up what several modules make of one input."""

    def __init__(self, *modules):
        self.modules = nnx.List(modules)

    def __call__(self, x):
        return sum(module(x) for module in self.modules)


def test_folding_with_one_convolution_under_two_batch_norms():
    def build():
        one, other, third = (ConvBN(4, 4, 3, rngs=nnx.Rngs(0)) for _ in range(3))
        other.conv = one.conv
        third.conv.kernel = one.conv.kernel
        return Several(one, other, third, one.conv)

    model = randomized(build)
    model.eval()
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(sc.fold_batch_norm(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_folding_stacked_units():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return sc.SlimConv(8, rngs=rngs)

    def units(model, x):
        return nnx.vmap(lambda unit, x: unit(x), in_axes=(0, None))(model, x)

    model = randomized(lambda: make(nnx.Rngs(0)))
    model.eval()
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 8)).astype(np.float32)
    np.testing.assert_allclose(units(sc.fold_batch_norm(model), x), units(model, x), atol=1e-5)


def test_what_flax_cannot_change_is_refused():
    conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    in_a_tuple, in_itself = Several(conv), Several(conv)
    in_a_tuple.pair = nnx.data((conv, [conv]))
    in_itself.modules.append(in_itself)
    for model in (in_a_tuple, in_itself):
        with pytest.raises(ValueError, match="slimify cannot change a model with modules in tupl"):
            sc.slimify(model)
    unit = nnx.eval_shape(lambda: sc.SlimConv(8, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="fold_batch_norm needs the values of the parameters"):
        sc.fold_batch_norm(unit)


def test_folding_leaves_the_batch_norm_of_others(vgg):
    slim = randomized(lambda: sc.slimify(vgg)[0])
    slim.eval()
    folded = sc.fold_batch_norm(slim)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(apply(folded, x), apply(slim, x), atol=1e-5)
    left = nnx.to_flat_state(nnx.state(folded, nnx.BatchStat))
    assert [path for path, _ in left] == [("norm", "mean"), ("norm", "var")]
    for model, message in ((vgg, "no batch norm of a ResNet or SlimConv"), (3, "not a int")):
        with pytest.raises(ValueError, match=message):
            sc.fold_batch_norm(model)
    with pytest.raises(ValueError, match="no batch norm of a ResNet or SlimConv"):
        sc.fold_batch_norm(folded)


def test_a_backbone_has_the_weights_on_denser_maps():
    config = ResNetConfig((1, 1, 1, 2), width=8, num_classes=3)
    model = randomized(lambda: abstract_resnet(config))
    model.eval()
    dense = sc.backbone(model, output_stride=8)
    assert dense.config == dataclasses.replace(config, num_classes=0, dilation=(False, True, True))
    features = nnx.jit(lambda model, x: (model.features(x), model(x)))
    x = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    (maps, _), (dense_maps, pooled) = features(model, x), features(dense, x)
    assert [m.shape[1] for m in dense_maps] == [16, 8, 8, 8]
    for one, other, stride in zip(maps, dense_maps, (1, 1, 2, 4), strict=True):
        np.testing.assert_allclose(one, other[:, ::stride, ::stride], atol=1e-4)
    np.testing.assert_allclose(pooled, dense_maps[-1].mean((1, 2)), rtol=1e-5)
    assert sc.backbone(dense).config == dense.config
    assert sc.backbone(dense, output_stride=32).config.dilation == (False, False, False)
    cifar = abstract_resnet(dataclasses.replace(config, stem="cifar"))
    assert sc.backbone(cifar, output_stride=4).config.dilation == (False, False, True)
    with pytest.raises(ValueError, match="output_stride=12 must be one of 32, 16, 8, 4"):
        sc.backbone(model, output_stride=12)
    with pytest.raises(ValueError, match="backbone takes a slimconv_jax ResNet, not a int"):
        sc.backbone(3)


def test_without_classes_a_model_pools():
    model = abstract_model("resnet14", num_classes=0, width=8)
    whole = abstract_model("resnet14", num_classes=7, width=8)
    assert sc.count_params(whole) - sc.count_params(model) == 7 * 256 + 7
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.bfloat16)
    pooled = nnx.eval_shape(lambda model, image: model(image), model, image)
    assert pooled.shape == (2, 256) and pooled.dtype == jnp.float32
