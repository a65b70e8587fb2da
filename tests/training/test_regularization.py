"""What a training step leaves out: how it is drawn, and what it does to a network."""

import jax
import numpy as np
import pytest
import torch
from cases import daily
from flax import nnx
from torch_state_dict import as_tensors, random_state_dict

from slimconv_jax import from_torch
from slimconv_jax.devices import batch_sharded, data_mesh, replicated
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.models.zoo import resnet_config
from slimconv_jax.torch_interop import reference
from slimconv_jax.training.regularization import draw_scales

SMALL = ResNetConfig((1, 2, 1, 1), reduction=2, width=8, num_classes=3, stem="cifar")
KINDS = {
    "sc": SMALL,
    "basic": ResNetConfig((1, 1, 1, 2), block="basic", width=8, num_classes=3, stem="cifar"),
    "se": ResNetConfig((1, 2, 1, 1), block="se", width=8, num_classes=3, stem="cifar"),
    "ghost": ResNetConfig((1, 2, 1, 1), block="ghost", width=8, num_classes=3, stem="cifar"),
}
LAST = {"basic": "bn2", "bottleneck": "bn3", "se": "se", "ghost": "conv3"}


def test_rates_rise_linearly_over_the_blocks_and_the_mean_stays():
    config = resnet_config("sc_resnet26", width=8, num_classes=3)
    scales = draw_scales(jax.random.key(0), 4000, config, drop_path_rate=0.3, dropout_rate=0.2)
    branches, features = scales["branch_scales"], scales["feature_scales"]
    assert branches.shape == (4000, 8) and features.shape == (4000, 8 * 32)
    rates = np.linspace(0, 0.3, 8)
    np.testing.assert_allclose((branches == 0).mean(axis=0), rates, atol=0.03)
    for column, rate in zip(np.asarray(branches).T, rates, strict=True):
        np.testing.assert_allclose(column[column > 0], 1 / (1 - rate), rtol=1e-6)
    assert abs((features == 0).mean() - 0.2) < 0.005
    np.testing.assert_allclose(features[features > 0], 1.25, rtol=1e-6)
    # Images and blocks are independent of each other.
    assert abs(np.corrcoef(np.asarray(branches)[:, 1:].T) - np.eye(7)).max() < 0.08


def test_only_what_is_asked_for():
    key = jax.random.key(0)
    assert draw_scales(key, 2, SMALL) == {}
    assert draw_scales(key, 2, SMALL, drop_path_rate=0.1).keys() == {"branch_scales"}
    assert draw_scales(key, 2, SMALL, dropout_rate=0.1).keys() == {"feature_scales"}
    for name in ("drop_path_rate", "dropout_rate"):
        with pytest.raises(ValueError, match=f"step: {name}=1 must be a number >= 0 and < 1"):
            draw_scales(key, 2, SMALL, **{name: 1})


def test_the_draw_is_the_same_on_any_number_of_devices():
    def draw(key):
        return draw_scales(key, 16, SMALL, drop_path_rate=0.5, dropout_rate=0.5)

    mesh = data_mesh()
    split = jax.jit(draw, in_shardings=replicated(mesh), out_shardings=batch_sharded(mesh))
    key = jax.random.key(0)
    jax.tree.map(np.testing.assert_array_equal, split(key), draw(key))


@pytest.mark.parametrize("config", daily({"sc", "basic"}, KINDS))
def test_scales_do_what_pytorch_does_with_them(config):
    """Against hooks that multiply, as timm does, each branch before the sum, and the features."""
    state_dict = random_state_dict(config)
    network = reference.ResNet(config)
    network.load_state_dict(as_tensors(state_dict), strict=False)
    network.eval()
    scales = draw_scales(jax.random.key(1), 6, config, drop_path_rate=0.6, dropout_rate=0.4)
    branch, feature = (torch.tensor(np.asarray(scale)) for scale in scales.values())
    assert (branch == 0).any() and (branch > 1).any()
    blocks = [block for stage in (1, 2, 3, 4) for block in getattr(network, f"layer{stage}")]
    for number, block in enumerate(blocks):
        getattr(block, LAST[config.block]).register_forward_hook(
            lambda _, __, y, scale=branch[:, number, None, None, None]: y * scale
        )
    network.fc.register_forward_pre_hook(lambda _, inputs: (inputs[0] * feature,))
    images = np.random.default_rng(0).normal(size=(6, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()

    model = from_torch(state_dict)

    @nnx.jit
    def forward(model, scales):
        return model(images, **scales)

    np.testing.assert_allclose(forward(model, scales), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(forward(model, {}) - expected).max() > 0.01
    ones = {name: np.ones_like(scale) for name, scale in scales.items()}
    np.testing.assert_allclose(forward(model, ones), forward(model, {}), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_scales_go_through_rematerialisation():
    state_dict = random_state_dict(SMALL)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    scales = draw_scales(jax.random.key(1), 4, SMALL, drop_path_rate=0.6)

    def gradients(remat):
        model = from_torch(state_dict)
        model.remat = remat
        model.train()
        graphdef, *states = nnx.split(model, nnx.Param, ...)
        params, rest = map(nnx.to_pure_dict, states)

        def loss(params):
            return (nnx.merge(graphdef, params, rest)(images, **scales) ** 2).mean()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for a, b in zip(gradients(False), gradients(True), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * np.abs(a).max())
