"""Builds the optimiser and its learning-rate schedule from Optax."""

from collections.abc import Callable, Sequence

import jax
import optax

from slimconv_jax.errors import InputError, require_choice, require_number
from slimconv_jax.training.fine_tuning import adapt

_OPTIONS = ("momentum", "nesterov", "b1", "b2", "eps", "trust_coefficient")

OPTIMIZERS: dict[str, tuple[Callable, Sequence[str], str | None]] = {
    "sgd": (optax.sgd, ("momentum", "nesterov"), None),
    "adamw": (optax.adamw, ("b1", "b2", "eps"), "mask"),
    "lars": (optax.lars, ("momentum", "nesterov", "eps", "trust_coefficient"), "weight_decay_mask"),
    "lamb": (optax.lamb, ("b1", "b2", "eps"), "mask"),
}
"""For each name, Optax's function, its options, and its name for the mask of the weight decay.

SGD has no weight decay of its own.
"""

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


def create_optimizer(
    learning_rate_fn: optax.Schedule,
    *,
    name: str = "sgd",
    weight_decay: float = 0.0,
    weight_decay_on: str = "kernels",
    clip_norm: float | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    b1: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
    trust_coefficient: float | None = None,
    freeze: Sequence[str] = (),
    learning_rate_factors: Sequence[str] = (),
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """Builds the optimiser; the keyword-only arguments are keys of `config.optimizer`.

    Args:
      learning_rate_fn: from `create_schedule`.
      name: "sgd", "adamw", "lars" or "lamb", as Optax has them.
      weight_decay: with SGD an L2 penalty as in PyTorch, added to the gradient before the
        momentum; with the others as in their papers.
      weight_decay_on: "kernels" for parameters of more than one dimension only, or "all". LARS
        adapts the rate of these parameters only, too.
      clip_norm: the gradient is scaled down to this norm if its norm is larger; None for never.
      momentum: of SGD and LARS; here and in the following, None for Optax's default.
      nesterov: whether the momentum is Nesterov's.
      b1: of AdamW and LAMB, decay of the mean of the gradients.
      b2: likewise, of their squares.
      eps: of AdamW, LAMB and LARS, added to a denominator.
      trust_coefficient: of LARS.
      freeze: patterns of names of parameters that stay as they are, such as "stem.*" (here and in
        the following, see `slimconv_jax.training.fine_tuning`).
      learning_rate_factors: patterns, each with a factor, such as "classifier.*=10".
      layer_decay: the factor from each block's learning rate to that of the one before it.

    Raises:
      ValueError: if a setting is out of range, or the optimiser has no such option.
    """
    require_choice("optimizer: name", name, OPTIMIZERS)
    if weight_decay_on not in ("kernels", "all"):
        raise InputError(
            f"optimizer: weight_decay_on={weight_decay_on!r} must be 'kernels' or 'all'"
        )
    require_number("optimizer: weight_decay", weight_decay, least=0)
    if clip_norm is not None:
        require_number("optimizer: clip_norm", clip_norm, least=1e-12)
    build, allowed, mask_name = OPTIMIZERS[name]
    values = (momentum, nesterov, b1, b2, eps, trust_coefficient)
    options = {key: value for key, value in zip(_OPTIONS, values, strict=True) if value is not None}
    for key, value in options.items():
        if key not in allowed:
            raise InputError(f"optimizer: {name} has no {key}; it has {', '.join(allowed)}")
        if key != "nesterov":
            below = 1 if key in ("momentum", "b1", "b2") else 1e6
            require_number(f"optimizer: {key}", value, least=0, below=below)
        elif not isinstance(value, bool):
            raise InputError(f"optimizer: nesterov={value!r} must be True or False")

    def decayed(params):
        return jax.tree.map(lambda p: weight_decay_on == "all" or p.ndim > 1, params)

    steps = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    if mask_name is None:
        steps.append(optax.add_decayed_weights(weight_decay, mask=decayed))
    else:
        options |= {"weight_decay": weight_decay, mask_name: decayed}
    if name == "lars":
        options["trust_ratio_mask"] = decayed
    return adapt(
        optax.chain(*steps, build(learning_rate_fn, **options)),
        freeze=freeze,
        learning_rate_factors=learning_rate_factors,
        layer_decay=layer_decay,
    )
