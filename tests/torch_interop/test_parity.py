import jax
import numpy as np
import pytest
from flax import nnx
from torch_state_dict import random_state_dict

from slimconv_jax import from_torch
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.torch_interop.parity import check_parity

CONFIG = ResNetConfig((1, 1, 1, 1), reduction=2, width=8, num_classes=5, stem="cifar")


@pytest.fixture(scope="module")
def state_dict():
    return random_state_dict(CONFIG)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).normal(size=(5, 16, 16, 3)).astype(np.float32)


def test_a_converted_model_agrees_at_every_stage(state_dict, images):
    parity = check_parity(from_torch(state_dict), state_dict, images, batch_size=2)
    stages = [(stage.stage, stage.shape) for stage in parity.stages]
    assert stages == [
        ("stem", (16, 16, 8)),
        ("stage 1", (16, 16, 32)),
        ("stage 2", (8, 8, 64)),
        ("stage 3", (4, 4, 128)),
        ("stage 4", (2, 2, 256)),
        ("logits", (5,)),
    ]
    assert parity.first_difference(1e-5) is None
    assert all(stage.finite == 1 for stage in parity.stages)
    assert parity.top1_agreement == 1
    assert (parity.images, parity.image_size) == (5, 16)


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("stem", lambda model: model.stem.bn.bias),
        ("stage 1", lambda model: model.stages[0][0].conv2.gate.excite.bias),
        ("stage 3", lambda model: model.stages[2][0].shortcut.conv.kernel),
        ("stage 4", lambda model: model.stages[3][0].conv3.conv.kernel),
        ("logits", lambda model: model.classifier.bias),
    ],
)
def test_the_first_stage_that_differs_is_named(state_dict, images, stage, change):
    model = from_torch(state_dict)
    variable = change(model)
    variable.set_value(variable[...].at[..., 0].add(0.1))
    parity = check_parity(model, state_dict, images[:2])
    assert parity.first_difference(1e-4).stage == stage
    assert parity.first_difference(1e9) is None


def test_classes_that_differ_are_counted(state_dict, images):
    model = from_torch(state_dict)
    model.classifier.bias.set_value(model.classifier.bias[...].at[2].add(100.0))
    other = state_dict | {"fc.bias": state_dict["fc.bias"] + 100 * np.eye(5, dtype="f")[3]}
    assert check_parity(model, other, images[:2]).top1_agreement == 0


def test_values_that_are_not_finite_must_be_so_in_both(state_dict, images):
    bad = {name: array.copy() for name, array in state_dict.items()}
    bad["layer2.0.conv1.weight"][0] = np.nan
    with pytest.warns(UserWarning, match=r"layer2.0.conv1.weight"):
        model = from_torch(bad)
    parity = check_parity(model, bad, images[:2])
    assert parity.first_difference(1e-4) is None
    assert [stage.finite == 1 for stage in parity.stages] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert parity.top1_agreement == 0  # nobody knows
    parity = check_parity(model, state_dict, images[:2])
    assert parity.first_difference(1e9).stage == "stage 2"


def test_float64(images):
    with jax.enable_x64(True):
        state_dict = random_state_dict(CONFIG, np.float64)
        model = from_torch(state_dict)
        assert model.stem.conv.kernel.dtype == np.float64
        parity = check_parity(model, state_dict, images[:2].astype(np.float64))
    assert parity.first_difference(1e-10) is None


def test_a_model_in_training_mode_is_compared_in_evaluation_mode(state_dict, images):
    model = from_torch(state_dict)
    model.train()
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert check_parity(model, state_dict, images[:2]).first_difference(1e-5) is None
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not model.stem.bn.use_running_average
