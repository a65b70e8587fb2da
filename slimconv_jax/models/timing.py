"""Measures how long a training step of any model takes on this machine."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slimconv_jax.models.layers import leave_devices
from slimconv_jax.models.mode import arguments_for

_BATCH_SIZE = 8
_ROUNDS = 5


def time_steps(models: Sequence[nnx.Module], image_shape: tuple[int, int, int]) -> tuple:
    """Measures the seconds of a forward and backward pass of each model.

    Runs the models in turns and returns the least of five times of each.

    Args:
      models: map images (8, *image_shape) to anything; they are not changed.
      image_shape: (H, W, C).
    """
    images = jax.random.normal(jax.random.key(0), (_BATCH_SIZE, *image_shape))
    programs = [_compile(model, images) for model in models]
    seconds = [[] for _ in programs]
    for _ in range(1 + _ROUNDS):
        for (step, params, rest), times in zip(programs, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(step(params, rest, images))
            times.append(time.perf_counter() - start)
    return tuple(min(times[1:]) for times in seconds)


def _compile(model: nnx.Module, images: jax.Array) -> tuple:
    model = nnx.clone(model)
    model.train()
    leave_devices(model)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: nnx.State, rest: nnx.State, images: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, rest, copy=True)
        output = model(images, **arguments_for(type(model).__call__, training=True))
        parts = [jnp.mean(jnp.square(leaf)) for leaf in jax.tree.leaves(output)]
        return sum(parts), nnx.split(model, nnx.Param, ...)[2]

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return step.lower(params, rest, images).compile(), params, rest
