"""Every config builds its model and optimiser, and takes a step."""

import dataclasses
import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from randomize import randomized

from slimconv_jax.models import zoo
from slimconv_jax.models.complexity import count_params
from slimconv_jax.training.augment import augment, normalize
from slimconv_jax.training.config import arguments, check_config
from slimconv_jax.training.optimizer import create_optimizer, create_schedule
from slimconv_jax.training.step import (
    abstract_state,
    create_state,
    data_mesh,
    make_train_step,
    replicated,
)

CONFIGS = sorted(path.stem for path in Path(__file__).parents[1].glob("configs/*.py"))

CLASSES = {"digits": 10, "tfds/cifar100": 100, "tfds/imagenet2012": 1000, "synthetic": 1000}

PARAMETERS = {
    "imagenet_sc_resnet50": 16_758_740,
    "imagenet_sc_resnet50_cosine": 16_758_740,
    "imagenet_sc_resnet101": 27_956_708,
    "imagenet_sc_resnext101_32x3d": 23_698_976,
    "imagenet_resnet50": 25_557_032,
    "cifar100_sc_resnet50": 14_906_960,
    "cifar100_resnet50": 23_705_252,
}


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


def build(config, model, num_classes, devices):
    """The step of a config, as a run of 5 steps an epoch has it, and its optimiser."""
    schedule = create_schedule(
        batch_size=config.batch_size,
        steps_per_epoch=5,
        total_steps=5 * config.num_epochs,
        **arguments(config.optimizer, create_schedule),
    )
    optimizer = create_optimizer(schedule, **arguments(config.optimizer, create_optimizer))
    step = make_train_step(
        model,
        optimizer,
        schedule,
        num_classes=num_classes,
        augment=functools.partial(augment, **config.augment),
        normalize=functools.partial(normalize, **config.normalize),
        key=jax.random.key(0),
        mesh=data_mesh(jax.devices()[:devices]),
        **config.step,
    )
    return step, optimizer, schedule


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_builds_its_model_and_its_step_at_full_size(name):
    config = load(name)
    check_config(config, num_devices=8)
    num_classes = CLASSES.get(config.dataset.name, 37)
    ema = config.step.ema_decay > 0
    model = zoo.abstract_model(num_classes=num_classes, **config.model)
    assert count_params(model) == PARAMETERS.get(name, count_params(model))
    step, optimizer, schedule = build(config, model, num_classes, devices=8)
    size = 224 if num_classes == 1000 or config.transform.get("image_size") else 32
    state = abstract_state(model, optimizer, ema=ema)
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].dtype == np.float32
    peak = max(float(schedule(step)) for step in range(5 * config.num_epochs))
    assert peak == pytest.approx(config.optimizer.learning_rate)


# The recipes of these are those of others; see the last test but one.
REPEATED = {
    "cifar100_resnet50",
    "imagenet_resnet50",
    "imagenet_sc_resnet50_cosine",
    "imagenet_sc_resnet101",
    "imagenet_sc_resnext101_32x3d",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in REPEATED)) for name in CONFIGS],
)
def test_a_config_takes_steps(name, monkeypatch):
    """With one block a stage, narrow if the groups allow it, on fake data."""
    config = load(name)
    num_classes = CLASSES.get(config.dataset.name, 37)
    ema = config.step.ema_decay > 0
    row = zoo.ARCHITECTURES[config.model.name]
    small = dataclasses.replace(row, blocks=(1, 1, 1, 1))
    monkeypatch.setitem(zoo.ARCHITECTURES, config.model.name, small)
    narrow = {**config.model, "width": 8 if row.groups == 1 else 64}
    model = randomized(lambda: zoo.abstract_model(num_classes=num_classes, **narrow))
    step, optimizer, _ = build(config, model, num_classes, devices=1)
    state = jax.tree.map(jnp.copy, create_state(model, optimizer, ema=ema))
    state = jax.device_put(state, replicated(data_mesh(jax.devices()[:1])))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(0, num_classes, 8).astype(np.int32),
    }
    before = np.array(state.params["classifier"]["kernel"])
    fast = {"xla_backend_optimization_level": 0}  # to compile
    key, *_ = step.args
    compiled = step.func.lower(key, state, batch).compile(compiler_options=fast)
    for _ in range(2):  # the first may have the rate 0
        state, metrics = compiled(key, state, batch)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert not np.array_equal(state.params["classifier"]["kernel"], before)


@pytest.mark.parametrize("prefix", ["imagenet_", "cifar100_"])
def test_models_that_are_compared_share_their_recipe(prefix):
    configs = {name: load(name) for name in CONFIGS if name.startswith(prefix)}
    configs.pop("cifar100_small", None)
    (first, *others) = (config.to_dict() for config in configs.values())
    assert others
    for config in (first, *others):
        for key in ("name", "k"):
            config["model"].pop(key, None)
        if config["optimizer"]["schedule"] == "cosine":
            config["optimizer"] |= {
                key: first["optimizer"][key] for key in ("schedule", "milestones", "decay_factor")
            }
    assert all(config == first for config in others)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_of_a_config_is_its_own(name):
    doc = importlib.import_module(f"configs.{name}").__doc__
    assert f"python train.py --config configs/{name}.py" in doc
