"""The Flax models against the PyTorch reference: the whole family, and one training step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch_state_dict import as_tensors, random_state_dict

from slimconv_jax import from_torch, to_torch
from slimconv_jax.devices import data_mesh, replicated
from slimconv_jax.models.slimconv import k_from_reduction
from slimconv_jax.models.zoo import ARCHITECTURES, abstract_resnet
from slimconv_jax.torch_interop.names import entries
from slimconv_jax.torch_interop.reference import ResNet
from slimconv_jax.training.optimizer import create_optimizer
from slimconv_jax.training.step import create_state, make_train_step

FAMILY = [
    *ARCHITECTURES.values(),
    *(dataclasses.replace(ARCHITECTURES["sc_resnet50"], reduction=r) for r in (3, 4, 8)),
]


def identify(config):
    name = next(
        name
        for name, row in ARCHITECTURES.items()
        if config == dataclasses.replace(row, reduction=row.reduction and config.reduction)
    )
    return f"{name}-{k_from_reduction(config.reduction)}" if config.reduction else name


def reference_with(state_dict, config):
    with torch.device("meta"):
        reference = ResNet(config)
    # Strict, but for the counters, which PyTorch makes itself.
    tensors = as_tensors(state_dict)
    for name in reference.state_dict():
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(0)
    reference.load_state_dict(tensors, assign=True)
    return reference


class Compiled(nnx.Module):
    """A block compiled on its own: equal ones, of any model, share one program."""

    def __init__(self, block):
        self.block = block

    def __call__(self, x):
        return compiled(self.block, x)


@nnx.jit
def compiled(block, x):
    return block(x)


def logits_error(config, dtype):
    """The largest difference of a model's logits and PyTorch's, relative to the largest logit."""
    images = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        state_dict = random_state_dict(config, dtype)
        model = from_torch(state_dict)
        assert model.config == config
        for blocks in model.stages:
            blocks[:] = [Compiled(block) for block in blocks]
        logits = np.asarray(model(jnp.asarray(images)))
    reference = reference_with(state_dict, config).eval()
    with torch.inference_mode():
        expected = reference(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert logits.dtype == expected.dtype == dtype
    return np.abs(logits - expected).max() / np.abs(expected).max()


def marked(names, long=()):
    """The family; what has none of these names runs with -m long or -m slow only."""
    marks = {identify(config): pytest.mark.slow for config in FAMILY}
    marks |= dict.fromkeys(long, pytest.mark.long) | dict.fromkeys(names, ())
    return [pytest.param(config, marks=marks[identify(config)]) for config in FAMILY]


EVERY_DAY = ("sc_resnet50-8/3",)
# Deeper ones have the same blocks, more often; wide ones have wider ones.
EVERY_BLOCK = (
    *("resnet18", "resnet50", "resnext50_32x4d", "sc_resnext50_32x4d-4/3", "sc_resnext101_32x3d-2"),
    *("sc_resnet50-4/3", "sc_resnet50-2", "sc_resnet50-16/3", "ghost_resnet50"),
)


@pytest.mark.parametrize("config", marked(EVERY_DAY, EVERY_BLOCK), ids=identify)
def test_logits_equal_pytorch_in_float64(config):
    assert logits_error(config, np.float64) <= 1e-10


@pytest.mark.parametrize("config", marked(("resnet18",), ("sc_resnet50-8/3",)), ids=identify)
def test_logits_equal_pytorch_in_float32(config):
    assert logits_error(config, np.float32) <= 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sc_resnet26", {"dilation": (False, True, True)}),
        ("sc_resnet14", {"gating": "plain", "sc_stages": (False, True, False, True)}),
        ("sc_resnet14", {"gating": "upper", "squeeze_ratio": 5, "min_squeezed": 3}),
        ("sc_resnet14", {"gating": None, "block": "se"}),
    ],
)
def test_settings_equal_pytorch(name, changes):
    config = dataclasses.replace(ARCHITECTURES[name], width=8, num_classes=3, **changes)
    state_dict = random_state_dict(config, np.float64)
    with jax.enable_x64(True):
        model = abstract_resnet(config)
        for name, entry in entries(model).items():
            entry.variable.set_value(jnp.asarray(entry.to_ours(state_dict[name])))
        model.eval()
        images = np.random.default_rng(1).normal(size=(2, 32, 32, 3))
        logits = np.asarray(compiled(model, images))
    reference = reference_with(state_dict, config).eval()
    with torch.inference_mode():
        expected = reference(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(np.float32, 1e-4), pytest.param(np.float64, 1e-9, marks=pytest.mark.slow)],
    ids=["float32", "float64"],
)
def test_a_training_step_equals_pytorch(dtype, tolerance):
    """Loss, gradients, new parameters and new statistics, of one step from the same start."""
    config = dataclasses.replace(
        ARCHITECTURES["sc_resnet14"], width=16, num_classes=10, stem="cifar"
    )
    rng = np.random.default_rng(2)
    images = rng.normal(size=(16, 16, 16, 3)).astype(dtype)
    labels = rng.integers(0, 10, 16)
    start = random_state_dict(config, dtype)
    rate, decay = 0.1, 1e-3

    reference = reference_with(start, config).train()
    counts = {}
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: counts.update(
                    {name: inputs[0].numel() // inputs[0].shape[1]}
                )
            )
    parameters = dict(reference.named_parameters())
    sgd = torch.optim.SGD(
        [
            {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in parameters.values() if p.ndim == 1]},
        ],
        lr=rate,
        momentum=0.9,
        nesterov=True,
    )
    logits = reference(torch.from_numpy(images).permute(0, 3, 1, 2))
    expected_loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    expected_loss.backward()
    sgd.step()

    with jax.enable_x64(dtype == np.float64):
        model = from_torch(start)
        optimizer = create_optimizer(
            lambda step: rate, momentum=0.9, nesterov=True, weight_decay=decay
        )
        mesh = data_mesh(jax.devices()[:1])
        step = make_train_step(
            model,
            optimizer,
            lambda step: rate,
            num_classes=model.config.num_classes,
            augment=lambda key, images, targets: (images, targets),
            normalize=lambda images: images,
            key=jax.random.key(0),
            mesh=mesh,
        )
        state = jax.device_put(create_state(from_torch(start), optimizer), replicated(mesh))
        state, metrics = step(state, {"image": images, "label": labels.astype(np.int32)})

        (trace,) = (
            s.trace
            for s in jax.tree.leaves(
                state.opt_state, is_leaf=lambda s: isinstance(s, optax.TraceState)
            )
            if isinstance(s, optax.TraceState)
        )
        after = to_torch(nnx.merge(nnx.graphdef(model), state.params, state.batch_stats))
        # The momentum after one step is the gradient with its weight decay.
        momentum = to_torch(nnx.merge(nnx.graphdef(model), trace, state.batch_stats))

    def close(ours, theirs, name):
        ours, theirs = np.asarray(ours), theirs.detach().numpy()
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), name

    close(metrics["loss"], expected_loss, "loss")
    for name, parameter in parameters.items():
        close(momentum[name] - decay * start[name] * (parameter.ndim > 1), parameter.grad, name)
        close(after[name], parameter, name)
    for name, n in counts.items():
        buffers = dict(reference.get_submodule(name).named_buffers())
        close(after[f"{name}.running_mean"], buffers["running_mean"], name)
        # PyTorch keeps the unbiased variance, Flax the biased one.
        old = 0.9 * start[f"{name}.running_var"]
        unbiased = old + (after[f"{name}.running_var"] - old) * n / (n - 1)
        close(unbiased, buffers["running_var"], name)
