"""Every config builds its model and optimiser, and takes a step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import daily
from randomize import randomized

from slimconv_jax.devices import data_mesh, replicated
from slimconv_jax.models import zoo
from slimconv_jax.models.complexity import count_params
from slimconv_jax.signatures import select
from slimconv_jax.training.config import check_config, read_config, shipped_configs
from slimconv_jax.training.optimizer import create_schedule
from slimconv_jax.training.setup import create_step
from slimconv_jax.training.step import abstract_state, create_state
from slimconv_jax.training.timetable import create_timetable

CONFIGS = [
    *("cifar100:resnet50", "cifar100:sc_resnet50", "cifar100:sc_resnet50,modern"),
    *("cifar100_small", "digits", "finetune", "finetune:probe"),
    *("imagenet:resnet50", "imagenet:sc_resnet50", "imagenet:sc_resnet50,cosine"),
    *("imagenet:sc_resnet101", "imagenet:sc_resnext101_32x3d", "synthetic"),
    *("imagenet:sc_resnet50,a1", "imagenet:resnet50,a2", "imagenet:sc_resnet50,a3"),
]

CLASSES = {"digits": 10, "tfds/cifar100": 100, "tfds/imagenet2012": 1000, "synthetic": 1000}

PARAMETERS = {
    "imagenet:sc_resnet50": 16_758_740,
    "imagenet:sc_resnet50,cosine": 16_758_740,
    "imagenet:sc_resnet101": 27_956_708,
    "imagenet:sc_resnext101_32x3d": 23_698_976,
    "imagenet:resnet50": 25_557_032,
    "cifar100:sc_resnet50": 14_906_960,
    "cifar100:resnet50": 23_705_252,
}


DAILY = {
    *("cifar100:sc_resnet50", "cifar100_small", "digits", "finetune", "finetune:probe"),
    *("imagenet:sc_resnet50", "synthetic"),
}
"""The recipes of the others are those of these, or take long to compile."""

EACH = daily(DAILY, {name: name for name in CONFIGS})


def test_every_config_is_here():
    assert {name.partition(":")[0] for name in CONFIGS} == shipped_configs().keys()


def abstract_model_of(config):
    num_classes = CLASSES.get(config.dataset.name, 37)
    return zoo.abstract_model(num_classes=num_classes, **config.model)


def build(config, model, devices):
    """The step of a config, as a run of 5 steps an epoch has it, and its optimiser."""
    timetable = create_timetable(config, 5 * config.batch_size)
    return create_step(config, model, timetable=timetable, mesh=data_mesh(jax.devices()[:devices]))


@pytest.mark.parametrize("name", EACH)
def test_a_config_builds_its_model_and_its_step_at_full_size(name):
    config = read_config(name)
    check_config(config, num_devices=8)
    model = abstract_model_of(config)
    assert count_params(model) == PARAMETERS.get(name, count_params(model))
    build(config, model, devices=8)
    schedule = create_schedule(
        config.batch_size, 5, 5 * config.num_epochs, **select(config.optimizer, create_schedule)
    )
    peak = max(float(schedule(step)) for step in range(5 * config.num_epochs))
    assert peak == pytest.approx(config.optimizer.learning_rate)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_takes_a_step_at_full_size_by_its_shapes(name):
    config = read_config(name)
    model = abstract_model_of(config)
    optimizer, step = build(config, model, devices=8)
    size = 224 if model.config.num_classes == 1000 or config.transform.image_size else 32
    state = abstract_state(model, optimizer, ema=config.step.ema_decay > 0)
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].dtype == np.float32


@pytest.mark.parametrize("name", EACH)
def test_a_config_takes_steps(name, monkeypatch):
    """With one basic block a stage, narrow, on fake data."""
    config = read_config(name)
    small = zoo.ResNetConfig((1, 1, 1, 1), block="basic")
    monkeypatch.setitem(zoo.ARCHITECTURES, config.model.name, small)
    config.model.update(k=None, width=8)
    model = randomized(lambda: abstract_model_of(config))
    optimizer, step = build(config, model, devices=1)
    state = jax.tree.map(jnp.copy, create_state(model, optimizer, ema=config.step.ema_decay > 0))
    state = jax.device_put(state, replicated(data_mesh(jax.devices()[:1])))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(0, model.config.num_classes, 8).astype(np.int32),
    }
    before = np.array(state.params["classifier"]["kernel"])
    for _ in range(2):  # the first may have the rate 0
        state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert not np.array_equal(state.params["classifier"]["kernel"], before)


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_the_command_of_a_config_is_its_own(name):
    (doc,) = re.findall(r'^r?"""(.*?)"""', shipped_configs()[name].read_text(), re.S)
    assert f"python train.py --config {name}" in doc


def test_an_unknown_recipe_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match="there is no recipe 'a4': cosine, a1, a2, a3"):
        read_config("imagenet:resnet50,a4")


def test_configs_of_the_version_before_mean_the_same():
    """A few keys of each, as the files of version 0.1 had them."""
    old = {
        "imagenet:sc_resnet50": ("multistep", (30, 60, 90), 0.1, 256, 100),
        "imagenet:sc_resnet50,cosine": ("cosine", (), 0.1, 256, 100),
        "cifar100:sc_resnet50": ("multistep", (60, 120, 160), 0.2, 128, 200),
    }
    for name, expected in old.items():
        config = read_config(name)
        optimizer = config.optimizer
        assert (
            *(optimizer.schedule, optimizer.milestones, optimizer.decay_factor),
            *(config.batch_size, config.num_epochs),
        ) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("galore", "galore cannot train this model: its state has arrays without elements"),
        ("sophia", "sophia cannot train this model: obj_fn must be provided"),
    ],
)
def test_an_optimizer_that_cannot_train_a_model(name, message):
    nothing = [f"--config.optimizer.{key}=None" for key in ("momentum", "nesterov")]
    config = read_config("digits", [f"--config.optimizer.name={name}", *nothing])
    with pytest.raises(ValueError, match=message):
        build(config, abstract_model_of(config), 1)
