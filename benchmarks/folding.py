"""What folding batch norm changes: nothing in the logits, and so much in the speed.

    python benchmarks/folding.py [--models PATTERN] [--batch-size N] [--image-size N]

For each architecture, with random weights and statistics: the largest difference between the logits
with and without `fold_batch_norm`, as a fraction of the largest logit, and images a second of
both, medians of repeats that take turns.
"""

import argparse
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scripts import run_script

import slimconv_jax as sc
from slimconv_jax.benchmark.measure import repeated, take_turns
from slimconv_jax.models.zoo import abstract_model


def randomized(name: str) -> nnx.Module:
    """A model of random weights that, like trained ones, do not amplify rounding."""
    model, rng = abstract_model(name), np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        shape = variable.shape
        if path[-1] in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, shape)
            if path[-1] == "scale" and "conv3" in path:  # of the end of a residual branch
                value *= 0.3
        elif path[-1] == "kernel":
            value = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        else:
            value = rng.normal(scale=0.3, size=shape)
        variable.set_value(jnp.asarray(value, jnp.float32))
    model.eval()
    return model


def compiled(model: nnx.Module, images: jax.Array) -> tuple[Callable, nnx.State]:
    """The compiled program of a model, and its arrays, which are arguments, as in use."""
    graphdef, state = nnx.split(model)
    program = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))
    return program.lower(state, images).compile(), state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="*", help="a pattern of names (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--image-size", type=int, default=224, metavar="N")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    args = parser.parse_args()
    shape = (args.batch_size, args.image_size, args.image_size, 3)
    images = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.batch_size} images at once, "
        f"{args.image_size}x{args.image_size} pixels, medians of {args.repeats}\n"
        f"{'model':22} {'difference':>10} {'images/s':>9} {'folded':>9} {'ratio':>6}"
    )
    for name in sc.list_models(args.models):
        model = randomized(name)
        programs = [compiled(m, images) for m in (model, sc.fold_batch_norm(model))]
        logits = [np.asarray(program(state, images)) for program, state in programs]
        difference = np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max()
        rounds = [repeated(program, state, images) for program, state in programs]
        seconds = take_turns(rounds, repeats=args.repeats)
        plain, folded = (args.batch_size / statistics.median(times) for times in seconds)
        print(
            f"{name:22} {difference:10.1e} {plain:9.1f} {folded:9.1f} {folded / plain:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    run_script(main)
