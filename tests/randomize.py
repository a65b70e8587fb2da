"""Models with random values in all places, so that no two layers can be mistaken.

Nothing is drawn or computed by JAX on the way: initialisers take long to compile.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx


def randomized(build: Callable[[], nnx.Module], dtype=np.float32, seed: int = 0) -> nnx.Module:
    """The model that `build` makes, with random parameters and batch statistics."""
    model = nnx.eval_shape(build)
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        shape, name = variable.shape, path[-1]
        if name in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif name == "kernel":
            value = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        else:
            value = rng.normal(scale=0.3, size=shape)
        variable.set_value(jnp.asarray(value, dtype))
    return model


@nnx.jit
def apply(model: nnx.Module, x):
    """The model's output, compiled as a whole; batch statistics are updated."""
    return model(x)
