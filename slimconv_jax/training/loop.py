"""A training run, from a config to its result."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from flax import nnx

from slimconv_jax.console import say
from slimconv_jax.data.loader import load_dataset
from slimconv_jax.data.sources import load_splits
from slimconv_jax.data.transforms import MOST_SIDE, Transform
from slimconv_jax.errors import InputError
from slimconv_jax.files import absolute
from slimconv_jax.models.complexity import count_macs, count_params
from slimconv_jax.models.resnet import ResNet
from slimconv_jax.models.zoo import abstract_model, create_model
from slimconv_jax.models.zoo import describe as describe_model
from slimconv_jax.saving import describe_workdir, load_model, read_info, versions
from slimconv_jax.training.augment import augment
from slimconv_jax.training.checkpoint import Checkpoints
from slimconv_jax.training.config import check_config
from slimconv_jax.training.evaluate import make_evaluate, summarize
from slimconv_jax.training.hosts import Comparison, on_first
from slimconv_jax.training.interruption import RunInterruptedError, StopSignal
from slimconv_jax.training.profiling import Profiler
from slimconv_jax.training.report import (
    Reporter,
    describe,
    describe_skipped,
    rank_evaluations,
    read_metrics,
)
from slimconv_jax.training.setup import create_preprocess, create_step, random_keys, uses_ema
from slimconv_jax.training.step import (
    TrainState,
    abstract_state,
    batch_sharded,
    create_state,
    data_mesh,
    replicated,
)
from slimconv_jax.work_directory import (
    CHECKPOINTS,
    METRICS,
    PICTURE,
    TENSORBOARD,
    claim_workdir,
    flatten,
    hold_workdir,
    list_checkpoints,
    newest_intact,
)

_OF_A_HOST = ("dataset.data_dir", "loader.num_threads")
"""The keys of a config in which the processes of a run may differ."""


def train(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    *,
    devices: list[jax.Device] | None = None,
) -> dict:
    """Trains and evaluates; continues from the newest intact checkpoint in the work directory.

    Without one, it starts from the model at `config.init_from`; without that, from scratch.

    Args:
      config: as a file in `configs/` returns it.
      workdir: gets `config.json`, `model.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`
        and `curves.png`. All processes of a run must reach it.
      devices: what to run on; all devices of all processes if None.

    Returns:
      The last evaluation of the weights themselves: `step` and what `summarize` gives.

    Raises:
      ValueError: if the config, the data or the work directory cannot be used, the training
        diverges, or a checkpoint cannot be written.
      RunInterruptedError: after SIGTERM or Ctrl-C, when the state is saved.
    """
    with contextlib.ExitStack() as held:
        comparison = held.enter_context(Comparison())
        return _train(config, absolute(workdir), data_mesh(devices), comparison, held)


def _train(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    mesh: jax.sharding.Mesh,
    comparison: Comparison,
    held: contextlib.ExitStack,
) -> dict:
    """Does what `train` says, in a work directory that `held` lets go of."""
    start = time.perf_counter()
    check_config(config, mesh.size)
    train_source, test_source = load_splits(**config.dataset)
    class_names = train_source.class_names
    model_args = {"num_classes": len(class_names), **config.model}
    model = abstract_model(**model_args)
    transform = Transform(**config.transform)
    # What is wrong with a config is found before it claims the directory, most of it before images
    # are decoded.
    augment_images = functools.partial(augment, **config.augment)
    prepare = create_preprocess(config)
    target = jax.ShapeDtypeStruct((1, len(class_names)), jnp.float32)

    def try_out(*image_shape: int) -> None:
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
        jax.eval_shape(augment_images, jax.random.key(0), image, target)
        jax.eval_shape(prepare, image)

    try_out(MOST_SIDE, MOST_SIDE, 3)  # any image is as large
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
    try_out(*train_data.image_shape)
    if len(train_data) < config.batch_size:
        raise InputError(
            f"there are only {len(train_data)} images to train on, fewer than "
            f"config.batch_size={config.batch_size}"
        )
    steps_per_epoch = len(train_data) / config.batch_size
    total_steps = max(round(config.num_epochs * steps_per_epoch), 1)
    if total_steps >= 2**31:
        raise InputError(
            f"config.num_epochs={config.num_epochs} are {total_steps} steps of "
            f"config.batch_size={config.batch_size}; a run has less than 2**31"
        )
    every = config.eval_every_epochs
    eval_epochs = range(every, config.num_epochs, every)
    eval_steps = {round(epoch * steps_per_epoch) for epoch in eval_epochs} | {total_steps}
    optimizer, train_step = create_step(
        config, model, steps_per_epoch=steps_per_epoch, total_steps=total_steps, mesh=mesh
    )
    evaluate = make_evaluate(model, preprocess=prepare, mesh=mesh)
    use_ema = uses_ema(config)
    height, width, _ = train_data.image_shape
    macs = count_macs(model, height)

    is_new = not list_checkpoints(workdir)
    if is_new and config.init_from:
        read_info(config.init_from)  # whether it is there, on every host
    comparison.require_same(
        {
            **{
                f"config.{key}": value
                for key, value in flatten(json.loads(config.to_json_best_effort())).items()
                if key not in _OF_A_HOST
            },
            "the architecture": json.dumps(dataclasses.asdict(model.config)),
            "the number of training images": len(train_data),
            "the number of test images": len(test_source),
            "the classes": _digest(class_names),
            "the work directory": str(workdir),
            "jax_enable_x64": jax.config.jax_enable_x64,
            **{f"the version of {name}": version for name, version in versions().items()},
        }
    )
    info = {
        "class_names": list(class_names),
        "preprocessing": {"image_size": transform.image_size, **config.normalize.to_dict()},
        "image_shape": list(train_data.image_shape),
    }

    starting, words = None, f"continuing {workdir}"
    if is_new:
        starting = create_model(rngs=nnx.Rngs(random_keys(config)[0]), **model_args)
        words = "from scratch"
        if config.init_from:
            words = _initialize(starting, config.init_from)

    def claim() -> int:
        held.enter_context(hold_workdir(workdir))
        claim_workdir(workdir, config)
        describe_workdir(model, workdir, info)
        return newest_intact(workdir)

    first_step = on_first(claim)
    tests = {
        (line["step"], line["split"]): line
        for line in read_metrics(workdir)
        if line["split"] != "train"
    }
    if first_step == total_steps and (total_steps, "test") in tests:
        result = tests[total_steps, "test"]
        say(f"{workdir} is complete, nothing to do: {describe(result)}")
        return result
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    say(
        f"model    {describe_model(model.config)}: {count_params(model):,} parameters, {macs:,} "
        f"multiply-adds at {width}x{height}\n"
        f"data     {len(train_data)} training images {train_data.where}, {len(test_source)} test "
        f"images, {len(class_names)} classes\n"
        f"devices  {mesh.size} x {mesh.devices.flat[0].device_kind}{processes}\n"
        f"steps    {total_steps} of {config.batch_size} images, {config.num_epochs} epochs\n"
        f"start    {words}{f' after step {first_step}' if first_step else ''}; compiling"
    )

    everywhere = replicated(mesh)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())  # first, so that the last save is waited for
        checkpoints = stack.enter_context(Checkpoints(workdir, to_keep=config.checkpoints_to_keep))
        if first_step:
            like = abstract_state(model, optimizer, ema=use_ema)
            state = checkpoints.restore(first_step, like=like, sharding=everywhere)
        else:
            state = jax.device_put(create_state(starting, optimizer, ema=use_ema), everywhere)
        reporter = stack.enter_context(
            Reporter(
                workdir,
                title=describe_model(model.config),
                first_step=first_step,
                total_steps=total_steps,
                steps_per_epoch=steps_per_epoch,
                batch_size=config.batch_size,
                log_every_steps=config.log_every_steps,
                eval_steps=eval_steps,
            )
        )
        profiler = stack.enter_context(
            Profiler(workdir, first_step=first_step, num_steps=config.profile_steps)
        )

        def until_stop(batches: Iterable) -> Iterator:
            for batch in batches:
                if stop.requested():
                    return
                yield batch

        def test(step: int, state: TrainState) -> None:
            """Evaluates and reports, unless it is told to stop meanwhile."""
            reporter.wait()
            models = {"test": (state.params, state.batch_stats)}
            if use_ema:
                models["test_ema"] = state.ema
            results = {}
            for name, (params, batch_stats) in models.items():
                batches = until_stop(test_data.eval_batches(config.eval_batch_size))
                totals = evaluate(params, batch_stats, batches)
                results[name] = summarize({key: total.item() for key, total in totals.items()})
            if not stop.requested():
                reporter.test(step, results)

        if first_step in eval_steps and (first_step, "test") not in tests:
            test(first_step, state)  # what an interruption prevented
            if stop.name:
                raise RunInterruptedError(stop.name, first_step)
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
            profiler.before(step)
            state, metrics = train_step(state, batch)
            profiler.after(step, metrics)
            reporter.train_step(step, metrics, data_seconds)
            if step in eval_steps:
                test(step, state)
            stopping = stop.requested()
            if stopping or step in eval_steps:
                reporter.flush(step)  # after which all is known to be finite
                best = [line["step"] for line in rank_evaluations(reporter.lines)]
                checkpoints.save(step, state, best=best)
            if stopping:
                checkpoints.wait()
                raise RunInterruptedError(stop.name, step)
        checkpoints.wait()

    for data in (train_data, test_data):
        if data.skipped:
            say(describe_skipped(data.skipped))
    lines = reporter.lines
    last = {line["split"]: line for line in lines if line["split"] != "train"}
    kept = {int(path.name) for path in list_checkpoints(workdir)}
    best = next(line for line in rank_evaluations(lines) if line["step"] in kept)
    say(f"finished in {_duration(time.perf_counter() - start)}\ntest     {describe(last['test'])}")
    if use_ema:
        say(f"averaged {describe(last['test_ema'])}")
    more = " --ema" if best["split"] == "test_ema" else ""
    if data_dir := config.dataset.get("data_dir"):
        more += f" --data-dir {shlex.quote(str(data_dir))}"
    say(
        f"best     {describe(best)}, after epoch {best['epoch']:.1f}:\n"
        f"         python -m slimconv_jax evaluate {workdir} --checkpoint {best['step']}{more}\n"
        f"files    {workdir}: {CHECKPOINTS}/, {METRICS}, {PICTURE}, {TENSORBOARD}/"
    )
    return last["test"]


def _initialize(model: ResNet, path: str) -> str:
    """Gives a new model the weights of a saved one, all but a classifier of another size.

    Returns:
      What was done, in words.

    Raises:
      ValueError: if the other is none, or of another architecture.
    """
    other = load_model(path)
    same = {"num_classes": model.config.num_classes, "dilation": model.config.dilation}
    if dataclasses.replace(other.config, **same) != model.config:
        raise InputError(
            f"config.init_from={path!r} is {describe_model(other.config)}, and config.model is "
            f"{describe_model(model.config)}; they must be the same but for the classes"
        )
    said = f"from the weights of {path}"
    if other.config.num_classes != model.config.num_classes:
        other.classifier = model.classifier
        said += f", but a new classifier of {model.config.num_classes} classes"
        if other.config.num_classes:
            said += f" in place of its {other.config.num_classes}"
    for kind in (nnx.Param, nnx.BatchStat):
        nnx.update(model, nnx.state(other, kind))
    return said


def _digest(class_names: Sequence[str]) -> str:
    names = json.dumps(class_names)
    first = f", from {class_names[0]!r} on" if class_names else ""
    return f"{len(class_names)}{first}, SHA-256 {hashlib.sha256(names.encode()).hexdigest()[:12]}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
