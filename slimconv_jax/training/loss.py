"""What training minimises: the loss of each image.

To add a loss, add an argument to `create_loss` that selects it.
"""

from collections.abc import Callable

import jax
import optax

from slimconv_jax.errors import require_number

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""Maps logits and targets, probabilities, both (N, classes), to losses (N,)."""


def create_loss(*, label_smoothing: float = 0.0) -> Loss:
    """Creates the loss of a run, cross-entropy; the arguments are keys of `config.step`.

    Args:
      label_smoothing: the share of the targets that is spread evenly over all classes.

    Raises:
      ValueError: if the share is out of range.
    """
    require_number("step: label_smoothing", label_smoothing, least=0, below=1)

    def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))

    return cross_entropy
