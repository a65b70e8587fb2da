"""Builds the optimiser and its learning-rate schedule from Optax."""

import functools
import inspect
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
import optax.contrib

from slimconv_jax.errors import InputError, require_choice, require_number
from slimconv_jax.training.fine_tuning import adapt

SCHEDULES = ("constant", "cosine", "multistep")


def create_schedule(
    batch_size: int,
    steps_per_epoch: float,
    total_steps: int,
    *,
    learning_rate: float,
    base_batch_size: int | None = None,
    schedule: str = "cosine",
    warmup_epochs: float = 0.0,
    milestones: Sequence[float] = (),
    decay_factor: float = 0.1,
) -> optax.Schedule:
    """Builds the schedule of the learning rate, by step.

    The keyword-only arguments are keys of `config.optimizer`.

    Args:
      batch_size: images in a step.
      steps_per_epoch: steps in an epoch, not necessarily a whole number.
      total_steps: steps in the run.
      learning_rate: the highest, for batches of `base_batch_size`.
      base_batch_size: the batch size that `learning_rate` is for; for others the rate is scaled
        linearly (Goyal et al., 2017). None for no scaling.
      schedule: after the warm-up, "constant", "cosine" (down to 0 at the end of the run) or
        "multistep" (times `decay_factor` at each of the `milestones`).
      warmup_epochs: epochs of linear increase from 0.
      milestones: epochs since the beginning, in ascending order.
      decay_factor: the factor at each milestone.

    Raises:
      ValueError: if a setting is not one of those.
    """
    require_choice("optimizer: schedule", schedule, SCHEDULES)
    for name, value in (
        ("learning_rate", learning_rate),
        ("warmup_epochs", warmup_epochs),
        ("decay_factor", decay_factor),
    ):
        require_number(f"optimizer: {name}", value, least=0)
    if base_batch_size is not None:
        require_number("optimizer: base_batch_size", base_batch_size, least=1)
        learning_rate *= batch_size / base_batch_size
    if isinstance(milestones, str) or not isinstance(milestones, Sequence):
        raise InputError(f"optimizer: milestones={milestones!r} must be a list of epochs")
    if bool(milestones) != (schedule == "multistep"):
        raise InputError(
            f"optimizer: milestones={tuple(milestones)} with schedule={schedule!r}; the schedule "
            "'multistep' needs some, the others take none"
        )
    for milestone, previous in zip(milestones, (warmup_epochs, *milestones), strict=False):
        require_number("optimizer: milestone", milestone, least=previous)

    if round(warmup_epochs * steps_per_epoch) > total_steps:
        epochs = round(total_steps / steps_per_epoch, 1)
        raise InputError(
            f"optimizer: warmup_epochs={warmup_epochs} is longer than the run, of {epochs:g} "
            "epochs; a shorter run needs a shorter warm-up"
        )
    warmup_steps = min(round(warmup_epochs * steps_per_epoch), total_steps - 1)
    rest = total_steps - warmup_steps
    if schedule == "cosine":
        decay = optax.cosine_decay_schedule(learning_rate, rest)
    else:
        factors = {}
        for milestone in milestones:
            step = round(milestone * steps_per_epoch) - warmup_steps
            factors[step] = factors.get(step, 1.0) * decay_factor
        decay = optax.piecewise_constant_schedule(learning_rate, factors)
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


@functools.cache
def find_optimizers() -> dict[str, Callable]:
    """Returns the optimisers of Optax, and of `optax.contrib`, by name."""
    return {
        name: function
        for module in (optax.contrib, optax)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if "learning_rate" in inspect.signature(function).parameters
        and not name.startswith(("_", "scale_by_"))
    }


_DECAY, _MASK = ("weight_decay", "weight_decay_rate"), ("mask", "weight_decay_mask")
"""What Optax's optimisers call the weight decay, and the parameters that it is for."""

_OURS = {"learning_rate", "key", "base_optimizer", *_DECAY, *_MASK}
"""Arguments that no config gives."""


def arguments_of(name: str) -> dict[str, inspect.Parameter]:
    """Returns the arguments of an optimiser that a config can give, none if there is none.

    Their annotations are their types. Excluded are those that are set otherwise, and functions.
    """
    if not isinstance(name, str) or name not in (known := find_optimizers()):
        return {}
    arguments = {}
    for key, parameter in inspect.signature(known[name]).parameters.items():
        default = None if parameter.default is parameter.empty else parameter.default
        kind = type(default)
        if "dtype" in key:
            kind = str
        elif default is None:
            choices = typing.get_args(parameter.annotation)
            kind = int if int in choices and float not in choices else float
        is_ours = key in _OURS or key.endswith(("_mask", "_dimension_numbers"))
        if kind in (bool, int, float, str, tuple) and not is_ours:
            arguments[key] = parameter.replace(default=None, annotation=kind)
    return arguments


def create_optimizer(
    learning_rate_fn: optax.Schedule,
    *,
    name: str = "sgd",
    weight_decay: float = 0.0,
    weight_decay_on: str = "kernels",
    clip_norm: float | None = None,
    freeze: Sequence[str] = (),
    learning_rate_factors: Sequence[str] = (),
    layer_decay: float = 1.0,
    **arguments: Any,
) -> optax.GradientTransformation:
    """Builds the optimiser; the keyword-only arguments are keys of `config.optimizer`.

    Args:
      learning_rate_fn: from `create_schedule`.
      name: any optimiser of Optax or `optax.contrib`, such as "sgd", "adamw", "lamb" or "muon".
      weight_decay: for optimisers that have none, such as SGD, an L2 penalty as in PyTorch, added
        to the gradient before the momentum; for the others as in their papers.
      weight_decay_on: "kernels" for parameters of more than one dimension only, or "all". LARS
        adapts the rate of these parameters only, too.
      clip_norm: the gradient is scaled down to this norm if its norm is larger; None for never.
      freeze: patterns of names of parameters that stay as they are, such as "stem.*" (here and in
        the following, see `slimconv_jax.training.fine_tuning`).
      learning_rate_factors: patterns, each with a factor, such as "classifier.*=10".
      layer_decay: the factor from each block's learning rate to that of the one before it.
      **arguments: those of Optax's function, such as `momentum`; None for its default.

    Raises:
      ValueError: if a setting is out of range, or the optimiser has no such argument.
    """
    known = find_optimizers()
    require_choice("optimizer: name", name, sorted(known))
    require_choice("optimizer: weight_decay_on", weight_decay_on, ("kernels", "all"))
    require_number("optimizer: weight_decay", weight_decay, least=0)
    if clip_norm is not None:
        require_number("optimizer: clip_norm", clip_norm, least=1e-12)
    arguments = {key: value for key, value in arguments.items() if value is not None}
    for key, value in arguments.items():
        _check_argument(name, key, value)

    def decayed(params):
        return jax.tree.map(lambda p: weight_decay_on == "all" or p.ndim > 1, params)

    steps = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    parameters = inspect.signature(known[name]).parameters
    decay = next((key for key in _DECAY if key in parameters), None)
    mask = next((key for key in _MASK if key in parameters), None)
    if decay is None:
        steps.append(optax.add_decayed_weights(weight_decay, mask=decayed))
    else:
        arguments[decay] = weight_decay
        if mask is not None:
            arguments[mask] = decayed
        elif weight_decay and weight_decay_on == "kernels":
            raise InputError(
                f"optimizer: {name} decays all parameters or none; set weight_decay_on='all'"
            )
    if "trust_ratio_mask" in parameters:
        arguments["trust_ratio_mask"] = decayed
    if "muon_weight_dimension_numbers" in parameters:  # else convolutions would be left to Adam
        arguments["muon_weight_dimension_numbers"] = _matrices
    try:
        optimizer = known[name](learning_rate_fn, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer: Optax cannot build {name}: {error}") from None
    if is_schedule_free(name) and (learning_rate_factors or layer_decay != 1):
        raise InputError(
            f"optimizer: learning_rate_factors and layer_decay are not for {name}, whose averaged "
            "weights would go on at the full rate"
        )
    return adapt(
        optax.chain(*steps, optimizer),
        freeze=freeze,
        learning_rate_factors=learning_rate_factors,
        layer_decay=layer_decay,
    )


def is_schedule_free(name: str) -> bool:
    """Returns whether an optimiser keeps averaged parameters of its own (Defazio et al., 2024)."""
    return name.startswith("schedule_free")


def averaged_params(opt_state: Any, params: Any) -> Any:
    """Returns the averaged parameters of an optimiser that `is_schedule_free`."""
    is_state = _is_a(optax.contrib.ScheduleFreeState)
    state = next(filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state)))
    is_frozen = _is_a(optax.MaskedNode)

    def average(z, y):
        return y if is_frozen(z) else ((y - (1 - state.b1) * z) / state.b1).astype(y.dtype)

    return jax.tree.map(average, state.z, params, is_leaf=is_frozen)


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, kind)


def _check_argument(name: str, key: str, value: Any) -> None:
    allowed = arguments_of(name)
    if key not in allowed:
        raise InputError(f"optimizer: {name} has no {key}; it has {', '.join(allowed)}")
    wanted = allowed[key].annotation
    if wanted is bool and not isinstance(value, bool):
        raise InputError(f"optimizer: {key}={value!r} must be True or False")
    if wanted in (int, float):
        is_share = re.fullmatch(r"momentum|(adam_)?b(eta)?\d?", key)
        require_number(f"optimizer: {key}", value, least=0, below=1 if is_share else 1e6)


def _matrices(params: Any) -> Any:
    """Says how Muon sees each kernel: as a matrix from all inputs of an output to the outputs."""

    def matrix(p):
        if p.ndim < 2:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1)

    return jax.tree.map(matrix, params)
