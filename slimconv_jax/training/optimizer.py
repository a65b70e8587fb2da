"""SGD with momentum, and its learning rate over time."""

import math
from numbers import Real

import jax
import optax

from slimconv_jax.errors import InputError


def create_optimizer(
    *,
    learning_rate: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    warmup_epochs: float,
    steps_per_epoch: float,
    total_steps: int,
) -> optax.GradientTransformation:
    """The optimiser; all but the last two are the keys of `config.optimizer`.

    Args:
      learning_rate: the peak, reached at the end of the warm-up.
      momentum: of SGD.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: L2 penalty as in PyTorch's SGD, added to the gradient before the momentum,
        on kernels only (parameters of more than one dimension).
      warmup_epochs: epochs of linear increase from 0, followed by a cosine down to 0.
      steps_per_epoch: steps in an epoch, not necessarily a whole number.
      total_steps: steps in the run.

    Raises:
      ValueError: if a number is negative, infinite or none.
    """
    for name, value in (
        ("learning_rate", learning_rate),
        ("momentum", momentum),
        ("weight_decay", weight_decay),
        ("warmup_epochs", warmup_epochs),
    ):
        if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
            raise InputError(f"optimizer: {name}={value!r} must be a number >= 0")
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=min(round(warmup_epochs * steps_per_epoch), total_steps - 1),
        decay_steps=total_steps,
    )
    return optax.chain(
        optax.add_decayed_weights(
            weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
        ),
        optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
    )
