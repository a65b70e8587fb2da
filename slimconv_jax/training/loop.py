"""Runs a training, from a config to its result."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shlex
import time
from collections.abc import Sequence

import jax
import ml_collections
from etils import epath

from slimconv_jax.console import say
from slimconv_jax.devices import data_mesh, replicated
from slimconv_jax.files import absolute
from slimconv_jax.inference.eval_step import describe, describe_skipped, summarize
from slimconv_jax.models.complexity import count_macs, count_params
from slimconv_jax.models.resnet import ResNet
from slimconv_jax.models.variables import variables
from slimconv_jax.models.zoo import describe as describe_model
from slimconv_jax.storage.checkpoints import CHECKPOINTS, list_checkpoints, newest_intact
from slimconv_jax.storage.model_directory import read_info, versions
from slimconv_jax.storage.work_directory import (
    METRICS,
    PICTURE,
    claim_workdir,
    describe_workdir,
    flatten,
    hold_workdir,
)
from slimconv_jax.training.checkpoint import Checkpoints
from slimconv_jax.training.config import complete, default_values
from slimconv_jax.training.fine_tuning import trained
from slimconv_jax.training.hosts import Comparison, on_first
from slimconv_jax.training.interruption import RunInterruptedError, StopSignal
from slimconv_jax.training.metrics import rank_evaluations, read_metrics
from slimconv_jax.training.profiling import Profiler
from slimconv_jax.training.report import Reporter
from slimconv_jax.training.setup import Parts, create_initial, create_parts, uses_ema
from slimconv_jax.training.step import TrainState, abstract_state, create_state
from slimconv_jax.training.timetable import train_batches

_OF_A_HOST = ("dataset.data_dir", "loader.num_threads")
"""The keys of a config that may differ between the processes of a run."""


def train(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    *,
    devices: list[jax.Device] | None = None,
) -> dict:
    """Trains and evaluates; continues from the newest intact checkpoint in the work directory.

    Without a checkpoint, it starts from the model at `config.init_from`; without that, from
    scratch.

    Args:
      config: as a file in `configs/` returns it; keys that it lacks have their defaults.
      workdir: gets `config.json`, `model.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`
        and `curves.png`. All processes of a run must reach it.
      devices: the devices to run on; None for all devices of all processes.

    Returns:
      The last evaluation of the weights themselves: `step` and the values of `summarize`.

    Raises:
      ValueError: if the config, the data or the work directory cannot be used, the training
        diverges, or a checkpoint cannot be written.
      RunInterruptedError: after SIGTERM or Ctrl-C, when the state is saved.
    """
    began = time.perf_counter()
    with contextlib.ExitStack() as held:
        comparison = held.enter_context(Comparison())
        workdir = absolute(workdir)
        # A bad config raises here, before it claims the directory.
        parts = create_parts(complete(config), data_mesh(devices))
        step, model, origin = _claim(parts, workdir, comparison, held)
        tests = {line["step"]: line for line in read_metrics(workdir) if line["split"] == "test"}
        if step == parts.timetable.total_steps and step in tests:
            say(f"{workdir} is complete, nothing to do: {describe(tests[step])}")
            return tests[step]
        _announce(parts, origin)
        lines = _run(parts, workdir, step, model, evaluated=step in tests)
    skipped = set().union(*(data.skipped for data in parts.train_data))
    for names in filter(None, (skipped, parts.test_data.skipped)):
        say(describe_skipped(names))
    say(f"finished in {_duration(time.perf_counter() - began)}")
    return _conclude(parts, workdir, lines)


def _claim(
    parts: Parts, workdir: epath.Path, comparison: Comparison, held: contextlib.ExitStack
) -> tuple[int, ResNet | None, str]:
    """Checks that the run can start, and locks the work directory for it until `held` ends.

    Returns:
      The steps done before, the model of a new run, and a description of what it starts from.
    """
    config, model, origin = parts.config, None, f"continuing {workdir}"
    is_new = not list_checkpoints(workdir)
    if is_new and config.init_from:
        read_info(config.init_from)  # raises if it is missing, on every host
    comparison.require_same(_facts(parts, workdir))
    if is_new:
        model, origin = create_initial(config, len(parts.class_names))

    def claim() -> int:
        held.enter_context(hold_workdir(workdir))
        claim_workdir(workdir, config, default_values())
        describe_workdir(parts.model, workdir, parts.info())
        return newest_intact(workdir)

    if step := on_first(claim):
        origin = f"continuing {workdir} after step {step}"
    return step, model, origin


def _facts(parts: Parts, workdir: epath.Path) -> dict:
    """Returns what must be the same in all processes of a run."""
    values = flatten(json.loads(parts.config.to_json_best_effort()))
    names = parts.class_names
    ((_, taught),) = parts.train_step.args
    weights = hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(taught)))
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
    first = f", from {names[0]!r} on" if names else ""
    return {
        **{f"config.{key}": value for key, value in values.items() if key not in _OF_A_HOST},
        "the architecture": json.dumps(dataclasses.asdict(parts.model.config)),
        "the number of training images": len(parts.train_data[-1]),
        "the number of test images": parts.num_test_images,
        "the classes": f"{len(names)}{first}, SHA-256 {digest}",
        "the SHA-256 of the teacher's weights": weights.hexdigest()[:12],
        "the work directory": str(workdir),
        "jax_enable_x64": jax.config.jax_enable_x64,
        **{f"the version of {name}": version for name, version in versions().items()},
    }


def _announce(parts: Parts, origin: str) -> None:
    """Prints what the run is going to do."""
    config, mesh, model = parts.config, parts.mesh, parts.model
    data, timetable = parts.train_data[-1], parts.timetable
    height, width, _ = data.image_shape
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    epochs = f"{config.num_epochs} epoch{'s' if config.num_epochs > 1 else ''}"
    sizes = [data.image_shape[0] for data in parts.train_data]
    steps = ", then ".join(
        f"{end - phase.first_step} of {phase.batch_size} images"
        + (f" at {size} pixels" if len(sizes) > 1 else "")
        for size, phase, end in zip(sizes, timetable.phases, timetable.knots[0][1:], strict=True)
    )
    learning = ""
    if freeze := config.optimizer.freeze:
        params = variables(model)["params"]
        pairs = zip(*map(jax.tree.leaves, (params, trained(params, freeze))), strict=True)
        learning = f" ({sum(p.size for p, is_trained in pairs if is_trained):,} of them trained)"
    say(
        f"model    {describe_model(model.config)}: {count_params(model):,} parameters{learning}, "
        f"{count_macs(model, height):,} multiply-adds at {width}x{height}\n"
        f"data     {len(data)} training images {data.where}, "
        f"{parts.num_test_images} test images, {len(parts.class_names)} classes\n"
        f"devices  {mesh.size} x {mesh.devices.flat[0].device_kind}{processes}\n"
        f"steps    {steps}, {epochs}\n"
        f"start    {origin}; compiling"
    )


def _run(
    parts: Parts, workdir: epath.Path, first_step: int, model: ResNet | None, *, evaluated: bool
) -> list[dict]:
    """Runs the steps after `first_step`; returns the lines of metrics.

    Args:
      parts: of the run.
      workdir: of the run.
      first_step: steps done before.
      model: the initial model of a new run.
      evaluated: whether the model has been evaluated after `first_step`.
    """
    config, timetable = parts.config, parts.timetable
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())  # the outermost: the last save ends before it
        checkpoints = stack.enter_context(Checkpoints(workdir, to_keep=config.checkpoints_to_keep))
        everywhere, ema = replicated(parts.mesh), uses_ema(config)
        if first_step:
            like = abstract_state(parts.model, parts.optimizer, ema=ema)
            state = checkpoints.restore(first_step, like=like, sharding=everywhere)
        else:
            state = jax.device_put(create_state(model, parts.optimizer, ema=ema), everywhere)
        title = describe_model(parts.model.config)
        reporter = Reporter(workdir, timetable, config, title=title, first_step=first_step)
        stack.enter_context(reporter)
        profiler = Profiler(workdir, first_step=first_step, num_steps=config.profile_steps)
        stack.enter_context(profiler)
        if first_step in timetable.eval_steps and not evaluated:
            _test(parts, first_step, state, reporter, stop)  # an interruption prevented it
            if stop.name:
                raise RunInterruptedError(stop.name, first_step)
        saved_at = time.monotonic()
        batches = train_batches(
            timetable, parts.train_data, seed=config.seed, first_step=first_step
        )
        metrics = None
        constants = jax.device_put(parts.train_step.args, everywhere)
        for step in range(first_step + 1, timetable.total_steps + 1):
            asked = time.perf_counter()
            batch = next(batches)
            data_seconds = time.perf_counter() - asked
            if metrics is not None and not metrics["loss"].is_ready():
                data_seconds = 0.0  # the devices are busy with the step before
            profiler.before(step)
            state, metrics = parts.train_step.func(*constants, state, batch)
            profiler.after(step, metrics)
            reporter.train_step(step, metrics, data_seconds)
            if step in timetable.eval_steps:
                _test(parts, step, state, reporter, stop)
            stopping = stop.requested()
            if stopping or step in timetable.checkpoint_steps or _is_due(config, step, saved_at):
                reporter.flush(step)  # raises if anything is not finite
                best = [line["step"] for line in rank_evaluations(reporter.lines)]
                checkpoints.save(step, state, best=best)
                saved_at = time.monotonic()
            if stopping:
                checkpoints.wait()
                raise RunInterruptedError(stop.name, step)
        checkpoints.wait()
    return reporter.lines


def _test(parts: Parts, step: int, state: TrainState, reporter: Reporter, stop: StopSignal) -> None:
    """Evaluates and reports, unless a signal asks to stop meanwhile."""
    reporter.wait()
    models = {"test": state.variables}
    if state.ema is not None:
        models["test_ema"] = {**state.variables, **state.ema}
    results = {}
    for name, collections in models.items():
        batches = parts.test_data.eval_batches(parts.config.eval_batch_size)
        batches = itertools.takewhile(lambda _: not stop.requested(), batches)
        totals = parts.evaluate(collections, batches)
        results[name] = summarize({key: total.item() for key, total in totals.items()})
    if not stop.requested():
        reporter.test(step, results)


def _is_due(config: ml_collections.ConfigDict, step: int, saved_at: float) -> bool:
    """Returns whether `checkpoint_every_minutes` have passed, by the clock of the first process."""
    if not config.checkpoint_every_minutes or step % config.log_every_steps:
        return False
    minutes = (time.monotonic() - saved_at) / 60
    return bool(on_first(lambda: int(minutes >= config.checkpoint_every_minutes)))


def _conclude(parts: Parts, workdir: epath.Path, lines: Sequence[dict]) -> dict:
    """Prints how good the model is; returns its last evaluation."""
    last = {line["split"]: line for line in lines}
    kept = {int(path.name) for path in list_checkpoints(workdir)}
    best = next(line for line in rank_evaluations(lines) if line["step"] in kept)
    say(f"test     {describe(last['test'])}")
    if "test_ema" in last:
        say(f"averaged {describe(last['test_ema'])}")
    more = " --ema" if best["split"] == "test_ema" else ""
    if data_dir := parts.config.dataset.data_dir:
        more += f" --data-dir {shlex.quote(str(data_dir))}"
    say(
        f"best     {describe(best)}, after epoch {best['epoch']:.1f}:\n"
        f"         slimconv evaluate {workdir} --checkpoint {best['step']}{more}\n"
        f"files    {workdir}: {CHECKPOINTS}/, {METRICS}, {PICTURE}"
    )
    return last["test"]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
