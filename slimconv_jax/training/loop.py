"""A training run, from a config to its result."""

import contextlib
import functools
import time

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from flax import nnx

from slimconv_jax.console import say
from slimconv_jax.data.loader import load_dataset
from slimconv_jax.data.sources import load_splits
from slimconv_jax.data.transforms import Transform
from slimconv_jax.errors import InputError
from slimconv_jax.models.complexity import count_macs, count_params
from slimconv_jax.models.zoo import abstract_model, create_model
from slimconv_jax.saving import describe_workdir
from slimconv_jax.training.augment import augment, normalize
from slimconv_jax.training.checkpoint import checkpoint_manager, claim_workdir, restore, save
from slimconv_jax.training.config import check_config
from slimconv_jax.training.evaluate import make_evaluate
from slimconv_jax.training.optimizer import create_optimizer
from slimconv_jax.training.report import (
    Reporter,
    describe,
    describe_skipped,
    read_metrics,
)
from slimconv_jax.training.step import (
    abstract_state,
    batch_sharded,
    create_state,
    data_mesh,
    make_train_step,
    replicated,
)


def train(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    *,
    devices: list[jax.Device] | None = None,
) -> dict:
    """Trains and evaluates; continues from the newest checkpoint in the work directory.

    Args:
      config: as a file in `configs/` returns it.
      workdir: gets `config.json`, `model.json`, `checkpoints/` and `metrics.jsonl`.
      devices: what to run on; all devices if None.

    Returns:
      The last evaluation: `step` and what `summarize` gives.

    Raises:
      ValueError: if the config, the data or the work directory cannot be used.
    """
    start = time.perf_counter()
    mesh = data_mesh(devices)
    check_config(config, mesh.size)
    train_source, test_source = load_splits(**config.dataset)
    model_args = {"num_classes": len(train_source.class_names), **config.model}
    model = abstract_model(**model_args)
    transform = Transform(**config.transform)
    prepare = functools.partial(normalize, **config.normalize)

    def augment_and_prepare(key, images):
        return prepare(augment(key, images, **config.augment))

    # What is wrong with a config is found before it claims the directory, most of it before images
    # are decoded.
    one_image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
    jax.eval_shape(augment_and_prepare, jax.random.key(0), one_image)
    train_data, test_data = (
        load_dataset(
            source,
            transform,
            training=source is train_source,
            sharding=batch_sharded(mesh),
            **config.loader,
        )
        for source in (train_source, test_source)
    )
    if len(train_data) < config.batch_size:
        raise InputError(
            f"there are only {len(train_data)} images to train on, fewer than "
            f"config.batch_size={config.batch_size}"
        )
    steps_per_epoch = len(train_data) / config.batch_size
    total_steps = max(round(config.num_epochs * steps_per_epoch), 1)
    every = config.eval_every_epochs
    eval_epochs = range(every, config.num_epochs, every)
    eval_steps = {round(epoch * steps_per_epoch) for epoch in eval_epochs} | {total_steps}
    optimizer = create_optimizer(
        steps_per_epoch=steps_per_epoch, total_steps=total_steps, **config.optimizer
    )
    image_shape = train_data.image_shape
    macs = count_macs(model, image_shape[0])
    workdir = claim_workdir(workdir, config)
    info = {
        "class_names": list(train_source.class_names),
        "preprocessing": {"image_size": transform.image_size, **config.normalize.to_dict()},
    }
    describe_workdir(model, workdir, info)
    say(
        f"{config.model.name}: {count_params(model):,} parameters, "
        f"{macs:,} multiply-adds at {image_shape[1]}x{image_shape[0]}\n"
        f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {len(train_data)} training images "
        f"{train_data.where}, {len(train_source.class_names)} classes\n"
        f"{config.num_epochs} epochs, {total_steps} steps of {config.batch_size} images"
    )

    with contextlib.closing(
        checkpoint_manager(workdir, to_keep=config.checkpoints_to_keep)
    ) as manager:
        first_step = manager.latest_step() or 0
        tests = {line["step"]: line for line in read_metrics(workdir) if line["split"] == "test"}
        if first_step == total_steps and total_steps in tests:
            say(f"{workdir} is complete, nothing to do: {describe(tests[total_steps])}")
            return tests[total_steps]

        with Reporter(
            workdir,
            first_step=first_step,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            batch_size=config.batch_size,
            log_every_steps=config.log_every_steps,
            eval_steps=eval_steps,
        ) as reporter:
            params_key, step_key = jax.random.split(jax.random.key(config.seed))
            everywhere = replicated(mesh)
            if first_step:
                like = abstract_state(model, optimizer)
                state = restore(manager, first_step, like=like, sharding=everywhere)
                say(f"continuing {workdir} after step {first_step}")
            else:
                new_model = create_model(rngs=nnx.Rngs(params_key), **model_args)
                state = jax.device_put(create_state(new_model, optimizer), everywhere)
            train_step = make_train_step(
                model, optimizer, preprocess=augment_and_prepare, key=step_key, mesh=mesh
            )
            evaluate = make_evaluate(model, preprocess=prepare, mesh=mesh)

            def test(step, state):
                batches = test_data.eval_batches(config.eval_batch_size)
                reporter.test(step, evaluate(state.params, state.batch_stats, batches))

            if first_step and first_step not in tests:  # interrupted while it was evaluated
                test(first_step, state)
            batches = train_data.train_batches(
                config.batch_size, seed=config.seed, first_step=first_step
            )
            metrics = None
            for step in range(first_step + 1, total_steps + 1):
                asked = time.perf_counter()
                batch = next(batches)
                data_seconds = time.perf_counter() - asked
                if metrics is not None and not metrics["loss"].is_ready():
                    data_seconds = 0.0  # the devices are busy with the step before
                state, metrics = train_step(state, batch)
                reporter.train_step(step, metrics, data_seconds)
                if step in eval_steps:
                    test(step, state)
                    save(manager, step, state)

    result = reporter.evaluation
    for data in (train_data, test_data):
        if data.skipped:
            say(describe_skipped(data.skipped))
    say(f"{describe(result)}, in {_duration(time.perf_counter() - start)}; see {workdir}")
    return result


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
