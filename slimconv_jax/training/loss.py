"""What training minimises: the loss of each image.

To add a loss, add a row to `LOSSES`; another setting is an argument of `create_loss`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from slimconv_jax.errors import InputError, require_choice, require_number
from slimconv_jax.inference.eval_step import Loss


def _cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array | float) -> jax.Array:
    if isinstance(weights, jax.Array):
        return -(weights * targets * jax.nn.log_softmax(logits)).sum(-1)
    return optax.softmax_cross_entropy(logits, targets)


def _binary(logits: jax.Array, targets: jax.Array, weights: jax.Array | float) -> jax.Array:
    return (weights * optax.sigmoid_binary_cross_entropy(logits, targets)).mean(-1)


LOSSES = {"cross_entropy": _cross_entropy, "binary_cross_entropy": _binary}
"""For each name, its function of logits, targets and the weights of the classes."""


def create_loss(
    num_classes: int,
    *,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    target_threshold: float | None = None,
    class_weights: Sequence[float] = (),
) -> Loss:
    """Creates the loss of a run; the keyword-only arguments are keys of `config.step`.

    Args:
      num_classes: of the data.
      loss: "cross_entropy", or "binary_cross_entropy" of every class against the rest, the mean
        over the classes.
      label_smoothing: the share of the targets that is spread evenly over all classes.
      target_threshold: for binary cross-entropy; a class with a larger share of a mixed image has
        the target 1, the others 0, before the smoothing (Wightman et al., 2021). None for shares.
      class_weights: for each class, a factor of its term in the loss, as PyTorch's `weight` with
        probabilities as targets. None of them for 1.

    Raises:
      ValueError: if a setting is out of range, or the weights are not one for each class.
    """
    require_choice("step: loss", loss, LOSSES)
    require_number("step: label_smoothing", label_smoothing, least=0, below=1)
    if target_threshold is not None:
        require_number("step: target_threshold", target_threshold, least=0, below=1)
        if loss != "binary_cross_entropy":
            raise InputError("step: target_threshold is for loss='binary_cross_entropy'")
    weights = 1.0
    if isinstance(class_weights, str) or not isinstance(class_weights, Sequence):
        raise InputError(f"step: class_weights={class_weights!r} must be a list of numbers")
    if class_weights:
        for weight in class_weights:
            require_number("step: class_weights", weight, least=0)
        if len(class_weights) != num_classes or not sum(class_weights):
            raise InputError(
                f"step: class_weights has {len(class_weights)} numbers; it must have "
                f"{num_classes}, one for each class, not all 0"
            )
        weights = jnp.asarray(class_weights, jnp.float32)

    def loss_of_images(logits: jax.Array, targets: jax.Array) -> jax.Array:
        if target_threshold is not None:
            targets = (targets > target_threshold).astype(targets.dtype)
        return LOSSES[loss](logits, optax.smooth_labels(targets, label_smoothing), weights)

    return loss_of_images
