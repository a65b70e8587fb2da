"""Evaluation: every example counts once, whatever the batch size and the devices."""

import time
from collections.abc import Callable, Collection, Iterable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from slimconv_jax.devices import batch_sharded, replicated
from slimconv_jax.inference.pieces import in_pieces
from slimconv_jax.models.variables import PyTree, merge

Totals = dict[str, jax.Array]

TOTALS = {
    "loss": jnp.float32,
    "loss_rest": jnp.float32,
    "top1": jnp.int32,
    "top5": jnp.int32,
    "examples": jnp.int32,
}
"""The sums of an evaluation; `loss_rest` is what rounding took from `loss`."""

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""Maps logits and targets, probabilities, both (N, classes), to losses (N,)."""


def make_evaluate(
    model: nnx.Module,
    *,
    normalize: Callable[[jax.Array], jax.Array],
    mesh: jax.sharding.Mesh,
    loss: Loss | None = None,
) -> Callable[..., Totals]:
    """Builds an evaluation that dispatches all its work to the devices without waiting.

    Args:
      model: gives the structure of the computation; its arrays are not used.
      normalize: maps `batch["image"]` to what the model takes.
      mesh: the devices; the batches are split over them.
      loss: of training, where it is another than cross-entropy.

    Returns:
      `evaluate(variables, batches, latencies=None)`. The batches have `image`, `label`
      and `mask`; the result has sums over the unmasked examples: `loss` (cross-entropy,
      float32), `top1` and `top5` (how many are right, int32) and `examples` (int32), and with a
      loss of training `training_loss` (float32). If
      `latencies` is a list, it waits for each batch and appends the seconds that the devices
      took for it.
    """
    add_batch = make_eval_step(model, normalize=normalize, mesh=mesh, loss=loss)

    def evaluate(
        variables: dict[str, PyTree],
        batches: Iterable[dict[str, jax.Array]],
        latencies: list[float] | None = None,
    ) -> Totals:
        sums = TOTALS | ({} if loss is None else {"training_loss": jnp.float32})
        zeros = {name: jnp.zeros((), dtype) for name, dtype in sums.items()}
        totals = jax.device_put(zeros, replicated(mesh))
        for batch in batches:
            start = time.perf_counter()
            totals = add_batch(totals, variables, batch)
            if latencies is not None:
                jax.block_until_ready(totals)
                latencies.append(time.perf_counter() - start)
        totals["loss"] += totals.pop("loss_rest")
        return totals

    return evaluate


def make_eval_step(
    model: nnx.Module,
    *,
    normalize: Callable[[jax.Array], jax.Array],
    mesh: jax.sharding.Mesh,
    loss: Loss | None = None,
) -> Callable[[Totals, dict[str, PyTree], dict[str, jax.Array]], Totals]:
    """Builds the jitted step of an evaluation, which adds the sums over a batch to the totals.

    The arguments are those of `make_evaluate`. `totals = step(totals, variables, batch)`, with the
    names and dtypes of `TOTALS`.
    """
    graphdef = nnx.graphdef(nnx.view(model, use_running_average=True))

    def add_batch(totals: Totals, variables: dict[str, PyTree], batch) -> Totals:
        model = merge(graphdef, variables)
        logits = in_pieces(model, batch["image"], prepare=normalize, mesh=mesh)
        label, mask = batch["label"], batch["mask"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        right = best == label[:, None]
        # Sums over thousands of batches lose digits in float32, unless the remainder is kept.
        total, rest = _add(totals["loss"], losses.sum(where=mask))
        more = {}
        if loss is not None:
            values = loss(logits, jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype))
            more["training_loss"] = totals["training_loss"] + values.sum(where=mask)
        return more | {
            "loss": total,
            "loss_rest": totals["loss_rest"] + rest,
            "top1": totals["top1"] + right[:, 0].sum(where=mask),
            "top5": totals["top5"] + right.any(axis=-1).sum(where=mask),
            "examples": totals["examples"] + mask.sum(),
        }

    everywhere = replicated(mesh)
    return jax.jit(
        add_batch,
        in_shardings=(everywhere, everywhere, batch_sharded(mesh)),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def summarize(totals: dict[str, float]) -> dict[str, float]:
    """Computes the metrics that are reported, from the totals of an evaluation.

    Returns:
      `loss` (mean), `top1` and `top5` (fractions), `correct` and `correct_top5` (counts),
      `examples`, and `training_loss` (mean) where the totals have it.
    """
    examples, correct, correct_top5 = (totals[name] for name in ("examples", "top1", "top5"))
    names = ("loss", "top1", "top5", *({"training_loss"} & totals.keys()))
    means = {name: totals[name] / max(examples, 1) for name in names}
    return means | {"correct": correct, "correct_top5": correct_top5, "examples": examples}


def describe(result: dict) -> str:
    """Describes the result of an evaluation, from `summarize`, in a few words."""
    words = "top-1 {top1:.2%} ({correct} of {examples} images), top-5 {top5:.2%}, loss {loss:.4f}"
    return words.format(**result)


def describe_skipped(skipped: Collection[str]) -> str:
    """Lists the images that could not be decoded, at most ten by name."""
    some = sorted(skipped)[:10]
    more = f" and {len(skipped) - len(some)} more" if len(skipped) > len(some) else ""
    return f"left out, since they cannot be decoded: {', '.join(some)}{more}"


def _add(total: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a sum, and what rounding took from it (Knuth's two-sum)."""
    result = total + term
    part = result - total
    return result, (total - (result - part)) + (term - part)
