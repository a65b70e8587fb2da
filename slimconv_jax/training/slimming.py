"""Puts SlimConv into a trained ResNet: new layers imitate the old ones, then the whole is taught.

    slimconv slim MODEL WORKDIR --k 8/3

Every 3x3 convolution of the bottlenecks, with the 1x1 convolution after it, becomes SlimConv with a
1x1 convolution. At first these learn, block by block and all blocks at once, to give what the
old ones give for the same input: least squares on the feature maps of training images. Then the
network trains for a few epochs as any other, with the old one as its teacher.
"""

import json
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from etils import epath
from flax import nnx
from flax.typing import Dtype

from slimconv_jax.console import Progress, say
from slimconv_jax.data.loader import Batch
from slimconv_jax.devices import batch_sharded, data_mesh, replicated
from slimconv_jax.errors import InputError, require_integer, require_number
from slimconv_jax.files import MissingFileError, absolute, read_json, replace_file
from slimconv_jax.inference.eval_step import make_evaluate, summarize
from slimconv_jax.inference.evaluate import refuse_data_dir
from slimconv_jax.inference.saved import SavedModel, open_model
from slimconv_jax.models.complexity import count_macs, count_params
from slimconv_jax.models.layers import at_least_float32
from slimconv_jax.models.resnet import Bottleneck, ResNet
from slimconv_jax.models.slimconv import CompressionRatio, SlimConv, k_from_reduction
from slimconv_jax.models.slimify import slimify
from slimconv_jax.models.variables import merge, variables
from slimconv_jax.models.zoo import ARCHITECTURES, abstract_resnet, describe, name_of
from slimconv_jax.storage.model_directory import save_model
from slimconv_jax.storage.work_directory import claim_workdir, hold_workdir
from slimconv_jax.training.config import (
    check_sections,
    complete,
    default_values,
    override,
    read_config,
    read_run_config,
    value_in,
)
from slimconv_jax.training.loop import train
from slimconv_jax.training.metrics import read_metrics
from slimconv_jax.training.optimizer import is_schedule_free
from slimconv_jax.training.setup import Parts, create_normalize, create_parts

IMITATED = "imitated"
"""The directory, in the work directory, of the model whose new layers imitate the old ones."""

REPORT = "slim.json"

RECIPE = {
    "optimizer.schedule": "cosine",
    "optimizer.milestones": (),
    "optimizer.warmup_epochs": 0.0,
    "optimizer.freeze": (),
    "optimizer.learning_rate_factors": (),
    "optimizer.layer_decay": 1.0,
    "transform.progressive_sizes": (),
    "distillation.weight": 0.5,
    "distillation.temperature": 2.0,
    "distillation.hard": False,
    "step.batch_norm": "global",
}
"""What differs, in the training at the end, from the config that it has otherwise."""

OURS = (
    *("init_from", "model.name", "model.k", "distillation.teacher"),
    *("distillation.checkpoint", "distillation.ema", "distillation.average"),
)
"""The keys that follow from the arguments of `slim`."""

RATE_FACTOR = 0.2
"""The learning rate of that training, in terms of the rate of that config."""


def slim(
    model: epath.PathLike,
    workdir: epath.PathLike,
    *,
    k: CompressionRatio = "4/3",
    config: str | None = None,
    overrides: tuple[str, ...] = (),
    data: str | None = None,
    data_dir: epath.PathLike | None = None,
    imitation_steps: int = 300,
    num_epochs: int = 5,
    checkpoint: int | None = None,
    ema: bool = False,
    average: int = 1,
) -> list[dict[str, Any]]:
    """Slims a trained ResNet, and continues where an earlier call with this `workdir` stopped.

    Args:
      model: a directory of `save_model` or of `train`, a network of bottlenecks without SlimConv.
      workdir: gets the files of `train`, the model before that in `imitated/`, and `slim.json`.
      k: compression ratio of SlimConv.
      config: a config to train with, as `read_config` takes it; None for that of the run at
        `model`, and for other models "finetune". Any but the run's own gets the preprocessing of
        the model; all get `RECIPE` and `RATE_FACTOR`.
      overrides: of that config, as in `read_config`. They override the other arguments, except
        that what is slimmed, and what it learns from, cannot be changed: the keys in `OURS`.
      data: the name of the data to train on; None for that of the config.
      data_dir: where they are. Needed even if the config of the run at `model` names a directory,
        since that file may be a stranger's.
      imitation_steps: steps in which the new layers learn to imitate the old ones.
      num_epochs: of the training after that.
      checkpoint: of a run at `model`, the step whose checkpoint to slim; None for the newest.
      ema: of a run at `model`, whether to slim the averaged weights.
      average: of a run at `model`, the number of checkpoints whose weights are averaged.

    Returns:
      The stages, also in `slim.json`: before, after imitation and after distillation, each with
      what it is, `top1` and `top5` (fractions) and `loss` of the test data (in the end of the
      averaged weights, if the run keeps some), `parameters`, `multiply_adds` of an image, and the
      `seconds` it took, of the training those of the last call.

    Raises:
      ValueError: if something cannot be used; see `train`.
    """
    require_integer("imitation_steps", imitation_steps, 0)
    require_integer("num_epochs", num_epochs, 1)
    if absolute(workdir) == absolute(model):
        raise InputError(f"{workdir} is the model itself; WORKDIR must be another directory")
    weights = {"checkpoint": checkpoint, "ema": ema, "average": average}
    workdir, old = absolute(workdir), open_model(model, **weights)
    new = _slimmed(old.model, k)
    for key in OURS:
        if value_in(overrides, key) is not None:
            raise InputError(f"config.{key} is for slim to set")
    data = value_in(overrides, "dataset.name") or data
    data_dir = value_in(overrides, "dataset.data_dir") or data_dir
    changes = {"init_from": str(workdir / IMITATED), "num_epochs": num_epochs}
    changes |= {f"distillation.{name}": value for name, value in weights.items()}
    changes |= {"distillation.teacher": str(absolute(model))}
    config = _config_of(old, new, config, data, data_dir, changes)
    config = override(config, overrides, of=str(model))

    parts = create_parts(config, data_mesh())
    if parts.model.config != new.config:
        raise InputError(
            f"the config makes {describe(parts.model.config)}, and {model} with SlimConv is "
            f"{describe(new.config)}"
        )
    with hold_workdir(workdir):
        claim_workdir(workdir, config, default_values())
        try:
            report = _read_report(workdir / REPORT)
            if (there := report[1]["imitation_steps"]) != imitation_steps:
                raise InputError(
                    f"{workdir} holds another experiment: imitation_steps is {there} there and "
                    f"{imitation_steps} here; choose another WORKDIR, or delete this one"
                )
        except MissingFileError:
            report = _start(old.model, new, parts, imitation_steps, workdir)
    if len(report) == 3:
        say(f"{workdir} is complete, nothing to do")
        return report
    size = parts.test_data.image_shape
    del parts  # train loads the data again
    start = time.perf_counter()
    train(config, workdir)
    seconds = time.perf_counter() - start
    last = {line["split"]: line for line in read_metrics(workdir)}
    result = last.get("test_ema", last["test"])
    report.append(_stage("after distillation", new, size, result, seconds))
    _write_report(workdir / REPORT, report)
    return report


def _start(
    old: ResNet, new: ResNet, parts: Parts, steps: int, workdir: epath.Path
) -> list[dict[str, Any]]:
    """Imitates, and saves the new model; returns the first two stages."""
    old, new = (_in_dtype(model, parts.config.model.dtype) for model in (old, new))
    size = parts.test_data.image_shape
    say(f"evaluating {describe(old.config)}; compiling")
    report = [_stage("before", old, size, _test(parts, old), 0.0)]
    say(describe_stage(report[0]))
    start = time.perf_counter()
    new = imitate(old, new, parts, steps=steps)
    seconds = time.perf_counter() - start
    stage = _stage("after imitation", new, size, _test(parts, new), seconds)
    report.append(stage | {"imitation_steps": steps})
    say(describe_stage(report[1]))
    save_model(new, workdir / IMITATED, info=parts.info(), overwrite=True)
    _write_report(workdir / REPORT, report)
    return report


def _in_dtype(model: ResNet, dtype: Dtype | None) -> ResNet:
    """Returns a model that computes in a dtype, with the arrays of another, for evaluation."""
    model = merge(nnx.graphdef(abstract_resnet(model.config, dtype=dtype)), variables(model))
    model.eval()
    return model


def _write_report(path: epath.Path, report: list[dict[str, Any]]) -> None:
    replace_file(path, (json.dumps(report, indent=2) + "\n").encode())


def _read_report(path: epath.Path) -> list[dict[str, Any]]:
    """Reads the stages that are finished, at least two.

    Raises:
      ValueError: if the file is damaged.
    """
    report = read_json(path)
    try:
        for stage in report:
            describe_stage(stage)
        is_whole = isinstance(report, list) and len(report) in (2, 3)
        is_whole = is_whole and "imitation_steps" in report[1]
    except (LookupError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise InputError(f"{path} is damaged; choose another WORKDIR, or delete this one")
    return report


def _slimmed(model: ResNet, k: CompressionRatio) -> ResNet:
    """Returns a ResNet with SlimConv, whose new layers have random parameters."""
    name = name_of(model.config) or ""
    if f"sc_{name}" not in ARCHITECTURES:
        raise InputError(
            f"slim takes a network of plain bottlenecks, such as resnet50, not "
            f"{describe(model.config)}"
        )
    new, report = slimify(model, k=k, image_size=32)
    if new.config.reduction is None:
        raise InputError(f"slim: {next(iter(report.left.values()))}")
    return new


def _config_of(
    old: SavedModel,
    new: ResNet,
    config: str | None,
    data: str | None,
    data_dir: epath.PathLike | None,
    changes: dict[str, Any],
) -> ml_collections.ConfigDict:
    """Returns the config to train a slimmed model with, which has `changes` by flat key."""
    recorded = read_run_config(old.path) if config is None else None
    last, changes = changes, dict(RECIPE)
    if config is not None:
        base = read_config(config)
    elif recorded is not None:
        base = recorded
        if data is None and data_dir is None:
            refuse_data_dir(old.path, base.dataset)
        # A stranger's file sends nothing elsewhere.
        changes["loggers"] = ("tensorboard",)
    else:
        base = read_config("finetune")
    check_sections(base)
    if "preprocessing" in old.info and recorded is None:  # the old model sees images as ever
        changes["transform.image_size"] = old.preprocessing.image_size
        changes["transform.crop_ratio"] = old.preprocessing.crop_ratio
        changes["normalize.mean"] = tuple(old.preprocessing.mean)
        changes["normalize.std"] = tuple(old.preprocessing.std)
    kind = new.config
    names = ("stem", "width", "dilation", "sc_stages")
    changes |= {f"model.{name}": getattr(kind, name) for name in names}
    changes |= {"model.name": name_of(kind), "model.k": str(k_from_reduction(kind.reduction))}
    if is_schedule_free(base.optimizer.name):
        changes["optimizer.schedule"] = "constant"
    if (rate := base.optimizer.learning_rate) is not None:
        require_number("optimizer: learning_rate", rate, least=0, below=1e6)
        changes["optimizer.learning_rate"] = RATE_FACTOR * rate
    if data is not None:
        base.dataset = ml_collections.ConfigDict({"name": data})
        base = complete(base)
    if data_dir is not None:
        changes["dataset.data_dir"] = str(data_dir)
    with base.unlocked(), base.ignore_type():  # `check_config` reports values of other types
        base.update_from_flattened_dict(changes | last)
    return base


def imitate(
    teacher: ResNet,
    student: ResNet,
    parts: Parts,
    *,
    steps: int,
    learning_rate: float = 3e-3,
) -> ResNet:
    """Trains the SlimConvs of a network to give what another has in their place.

    Each SlimConv, with the 1x1 convolution and the batch norm after it, gets what the teacher's
    3x3 convolution gets. Its error is the mean square of the difference of the outputs, relative to
    the variance of the teacher's; Adam minimises the sum over all blocks.

    Args:
      teacher: a network of bottlenecks.
      student: one that differs in its SlimConvs and what follows them in their blocks.
      parts: of a run, for its training images.
      steps: how many, each of the images that the run computes at once.
      learning_rate: of Adam at first; it falls to 0 as a cosine.

    Returns:
      A model with the trained layers, in evaluation mode.
    """
    teacher, student = nnx.clone(teacher), nnx.clone(student)
    teacher.eval()
    student.eval()
    for _, module in nnx.iter_modules(student):
        if isinstance(module, SlimConv):
            module.train()
    seen, learnt = map(nnx.graphdef, (teacher, student))
    normalize = create_normalize(parts.config)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))

    def step(fixed, state, opt_state, images):
        def loss_fn(params):
            model = merge(learnt, state | {"params": params})
            errors = jnp.stack(list(_errors(merge(seen, fixed), model, normalize(images))))
            return errors.sum(), (variables(model)["batch_stats"], errors.mean())

        grads, (stats, error) = jax.grad(loss_fn, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(state["params"], updates)
        return state | {"params": params, "batch_stats": stats}, opt_state, error

    everywhere, split = replicated(parts.mesh), batch_sharded(parts.mesh)
    step = jax.jit(step, in_shardings=(everywhere, everywhere, everywhere, split))
    state = jax.device_put(variables(student), everywhere)
    fixed = jax.device_put(variables(teacher), everywhere)
    opt_state = jax.device_put(optimizer.init(state["params"]), everywhere)
    size = parts.config.batch_size // parts.config.step.accumulation_steps
    with Progress("imitating", steps * size) as progress:
        for _, batch in zip(range(steps), _batches(parts, size), strict=False):
            state, opt_state, error = step(fixed, state, opt_state, batch["image"])
            error.block_until_ready()
            progress.advance(size)
    if steps:
        say(f"imitation: {error:.1%} of the variance of the old layers' outputs is left")
    student = merge(learnt, state)
    student.eval()
    return student


def _batches(parts: Parts, size: int) -> Iterator[Batch]:
    return parts.train_data[-1].train_batches(size, seed=parts.config.seed, first_step=0)


def _errors(teacher: ResNet, student: ResNet, images: jax.Array) -> Iterator[jax.Array]:
    """Yields the relative error of each SlimConv; see `imitate`."""
    x = teacher.stem_output(images)
    for theirs, ours in zip(teacher.stages, student.stages, strict=True):
        for old, new in zip(theirs, ours, strict=True):
            if isinstance(new, Bottleneck) and isinstance(new.conv2, SlimConv):
                inner = nnx.relu(old.conv1(x))
                outputs = (b.conv3(nnx.relu(b.conv2(inner))) for b in (old, new))
                wanted, output = (x.astype(at_least_float32(x.dtype)) for x in outputs)
                variance = jnp.square(wanted - wanted.mean((0, 1, 2))).mean()
                yield jnp.square(output - wanted).mean() / (variance + 1e-12)
            x = old(x)


def _test(parts: Parts, model: ResNet) -> dict[str, float]:
    """Evaluates a model on the test data of a run."""
    evaluate = make_evaluate(model, normalize=create_normalize(parts.config), mesh=parts.mesh)
    weights = jax.device_put(variables(model), replicated(parts.mesh))
    totals = evaluate(weights, parts.test_data.eval_batches(parts.config.eval_batch_size))
    return summarize({name: total.item() for name, total in totals.items()})


def _stage(what: str, model: ResNet, size: tuple, result: dict, seconds: float) -> dict[str, Any]:
    if not math.isfinite(result["loss"]):
        raise InputError(
            f"slim: the test loss {what} is {result['loss']}; another config.model.dtype may help"
        )
    return {
        "stage": what,
        "model": describe(model.config),
        **{name: result[name] for name in ("top1", "top5", "loss", "examples")},
        "parameters": count_params(model),
        "multiply_adds": count_macs(model, size),
        "seconds": seconds,
    }


def describe_stage(stage: dict[str, Any]) -> str:
    """Describes a stage in a line."""
    line = (
        "{stage:18}  top-1 {top1:.2%}  top-5 {top5:.2%}  {parameters:,} parameters, "
        "{multiply_adds:,} multiply-adds  {seconds:.0f} s"
    )
    return line.format(**stage)
