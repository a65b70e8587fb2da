"""Distillation: a model also learns to answer as a trained one, its teacher, does."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from flax.typing import Dtype

from slimconv_jax.errors import InputError, require_number
from slimconv_jax.files import absolute
from slimconv_jax.inference.saved import open_model
from slimconv_jax.models.variables import variables
from slimconv_jax.storage.checkpoints import list_checkpoints


class Teacher(NamedTuple):
    """A model to learn from.

    Attributes:
      graphdef: the structure of the computation, in evaluation mode.
      variables: its arrays, by collection.
      normalize: maps images to inputs of the model.
      weight: of its share in the loss.
      loss: maps the student's and the teacher's logits, both (N, classes), to losses (N,).
    """

    graphdef: nnx.GraphDef
    variables: dict[str, Any]
    normalize: Callable[[jax.Array], jax.Array]
    weight: float
    loss: Callable[[jax.Array, jax.Array], jax.Array]


def newest_checkpoint(teacher: str | None) -> int | None:
    """Returns the step of the newest checkpoint of a teacher; None if it is no training run."""
    if not isinstance(teacher, str) or not teacher:
        return None
    there = list_checkpoints(absolute(teacher))
    return int(there[-1].name) if there else None


def create_teacher(
    num_classes: int,
    class_names: Sequence[str] | None,
    dtype: Dtype | None,
    *,
    teacher: str | None = None,
    weight: float = 0.5,
    temperature: float = 1.0,
    hard: bool = False,
    checkpoint: int | None = None,
    ema: bool = False,
    average: int = 1,
) -> Teacher | None:
    """Opens the teacher of a run; the keyword-only arguments are keys of `config.distillation`.

    Args:
      num_classes: of the data.
      class_names: of the data; None where they are unknown.
      dtype: of the teacher's computation.
      teacher: a directory of `convert` or of another run; None for no distillation.
      weight: the share of the teacher in the loss, from 0 to 1; the labels have the rest.
      temperature: by which the logits of both are divided. The loss is the Kullback-Leibler
        divergence of the student from the teacher, times the square of the temperature (Hinton et
        al., 2015).
      hard: whether the loss is the cross-entropy with the teacher's most likely class instead.
      checkpoint: of another run, the step whose checkpoint has the weights; None for the newest.
        A run continues with the same one only.
      ema: of another run, whether to take the averaged weights.
      average: of another run, the number of checkpoints whose weights are averaged.

    Returns:
      The teacher; None without one, or with weight 0.

    Raises:
      ValueError: if a setting is out of range, there is no such model, or its classes are others.
    """
    require_number("distillation: weight", weight, least=0, most=1)
    require_number("distillation: temperature", temperature, least=0.01)
    for name, value in {"hard": hard, "ema": ema}.items():
        if not isinstance(value, bool):
            raise InputError(f"distillation: {name}={value!r} must be True or False")
    if teacher is None or not weight:
        return None
    if not isinstance(teacher, str) or not teacher:
        raise InputError(f"distillation: teacher={teacher!r} must be a path or None")
    try:
        saved = open_model(teacher, dtype=dtype, checkpoint=checkpoint, ema=ema, average=average)
    except InputError as error:
        raise InputError(f"distillation: teacher: {error}") from None
    if saved.model.config.num_classes != num_classes:
        raise InputError(
            f"distillation: the teacher {teacher} has {saved.model.config.num_classes} classes, "
            f"and the data have {num_classes}"
        )
    for theirs, ours in zip(saved.class_names or (), class_names or (), strict=False):
        if theirs != ours:
            raise InputError(
                f"distillation: the teacher {teacher} has a class {theirs!r} where the data have "
                f"{ours!r}"
            )

    def loss(logits: jax.Array, answers: jax.Array) -> jax.Array:
        if hard:
            return optax.softmax_cross_entropy_with_integer_labels(logits, answers.argmax(-1))
        ours, theirs = (jax.nn.log_softmax(x / temperature) for x in (logits, answers))
        return temperature**2 * optax.losses.kl_divergence_with_log_targets(ours, theirs)

    # NumPy arrays, which programs for devices that are not here take, too.
    arrays = jax.tree.map(np.asarray, variables(saved.model))
    return Teacher(nnx.graphdef(saved.model), arrays, saved.normalize, weight, loss)
