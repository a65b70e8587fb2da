"""Evaluation: every example counts once, whatever the batch size and the devices."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from slimconv_jax.training.step import TrainState, batch_sharded, replicated

Totals = dict[str, jax.Array]


def make_evaluate(
    model: nnx.Module,
    *,
    preprocess: Callable[[jax.Array], jax.Array],
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, Iterable[dict[str, jax.Array]]], Totals]:
    """An evaluation that hands all its work to the devices and waits for none of it.

    Args:
      model: gives the structure of the computation; its arrays are not used.
      preprocess: maps `batch["image"]` to what the model takes.
      mesh: the devices; the batches are split over them.

    Returns:
      A function of a state and batches with `image`, `label` and `mask` that returns sums over
      the unmasked examples: `loss` (cross-entropy, float32), `correct` (top-1, int32) and
      `examples` (int32).
    """
    graphdef = nnx.graphdef(nnx.view(model, use_running_average=True))

    def add_batch(totals: Totals, params, batch_stats, batch: dict[str, jax.Array]) -> Totals:
        logits = nnx.merge(graphdef, params, batch_stats)(preprocess(batch["image"]))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = logits.argmax(axis=-1) == batch["label"]
        mask = batch["mask"]
        return {
            "loss": totals["loss"] + losses.sum(where=mask),
            "correct": totals["correct"] + correct.sum(where=mask),
            "examples": totals["examples"] + mask.sum(),
        }

    everywhere = replicated(mesh)
    add_batch = jax.jit(
        add_batch,
        in_shardings=(everywhere, everywhere, everywhere, batch_sharded(mesh)),
        out_shardings=everywhere,
        donate_argnums=0,
    )

    def evaluate(state: TrainState, batches: Iterable[dict[str, jax.Array]]) -> Totals:
        zeros = {"loss": jnp.float32(0), "correct": jnp.int32(0), "examples": jnp.int32(0)}
        totals = jax.device_put(zeros, everywhere)
        for batch in batches:
            totals = add_batch(totals, state.params, state.batch_stats, batch)
        return totals

    return evaluate
