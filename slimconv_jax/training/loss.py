"""What training minimises: losses of logits and targets."""

import jax
import optax

from slimconv_jax.errors import require_number


def cross_entropy(
    logits: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """The cross-entropy of each image; its options are keys of `config.step`.

    Args:
      logits: (N, classes).
      targets: (N, classes) probabilities.
      label_smoothing: what share of the targets is spread evenly over all classes.

    Returns:
      (N,).

    Raises:
      ValueError: if the share is out of range.
    """
    require_number("step: label_smoothing", label_smoothing, least=0, below=1)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))
