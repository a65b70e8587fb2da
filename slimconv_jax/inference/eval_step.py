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
"""What an evaluation adds up; `loss_rest` is what rounding took from `loss`."""


def make_evaluate(
    model: nnx.Module,
    *,
    normalize: Callable[[jax.Array], jax.Array],
    mesh: jax.sharding.Mesh,
) -> Callable[..., Totals]:
    """An evaluation that hands all its work to the devices and waits for none of it.

    Args:
      model: gives the structure of the computation; its arrays are not used.
      normalize: maps `batch["image"]` to what the model takes.
      mesh: the devices; the batches are split over them.

    Returns:
      `evaluate(variables, batches, latencies=None)`. The batches have `image`, `label`
      and `mask`; the result has sums over the unmasked examples: `loss` (cross-entropy,
      float32), `top1` and `top5` (how many are right, int32) and `examples` (int32). If
      `latencies` is a list, it waits for each batch and appends the seconds that the devices
      took for it.
    """
    add_batch = make_eval_step(model, normalize=normalize, mesh=mesh)

    def new_totals() -> Totals:
        zeros = {name: jnp.zeros((), dtype) for name, dtype in TOTALS.items()}
        return jax.device_put(zeros, replicated(mesh))

    def evaluate(
        variables: dict[str, PyTree],
        batches: Iterable[dict[str, jax.Array]],
        latencies: list[float] | None = None,
    ) -> Totals:
        totals = new_totals()
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
) -> Callable[[Totals, dict[str, PyTree], dict[str, jax.Array]], Totals]:
    """The jitted step of an evaluation: adds the sums over a batch to those before it.

    Arguments are those of `make_evaluate`. `totals = step(totals, variables, batch)`, with the
    names and dtypes of `TOTALS`.
    """
    graphdef = nnx.graphdef(nnx.view(model, use_running_average=True))

    def add_batch(totals: Totals, variables: dict[str, PyTree], batch) -> Totals:
        model = merge(graphdef, variables)
        logits = in_pieces(lambda x: model(normalize(x)), batch["image"], mesh=mesh)
        label, mask = batch["label"], batch["mask"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        right = best == label[:, None]
        # Thousands of batches are added up: float32 would lose digits without its remainder.
        loss, rest = _add(totals["loss"], losses.sum(where=mask))
        return {
            "loss": loss,
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
    """What is reported of an evaluation's totals, as Python numbers.

    Returns:
      `loss` (mean), `top1` and `top5` (fractions), `correct` and `correct_top5` (counts) and
      `examples`.
    """
    examples = totals["examples"]
    return {
        "loss": totals["loss"] / max(examples, 1),
        "top1": totals["top1"] / max(examples, 1),
        "top5": totals["top5"] / max(examples, 1),
        "correct": totals["top1"],
        "correct_top5": totals["top5"],
        "examples": examples,
    }


def describe(result: dict) -> str:
    """An evaluation, as `summarize` gives it, in a few words."""
    words = "top-1 {top1:.2%} ({correct} of {examples} images), top-5 {top5:.2%}, loss {loss:.4f}"
    return words.format(**result)


def describe_skipped(skipped: Collection[str]) -> str:
    """Which images could not be decoded, at most ten by name."""
    some = sorted(skipped)[:10]
    more = f" and {len(skipped) - len(some)} more" if len(skipped) > len(some) else ""
    return f"left out, since they cannot be decoded: {', '.join(some)}{more}"


def _add(total: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A sum, and what rounding took from it (Knuth's two-sum)."""
    result = total + term
    part = result - total
    return result, (total - (result - part)) + (term - part)
