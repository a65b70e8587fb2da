"""Operations with two implementations, of which each platform gets the faster one.

JAX chooses when it lowers a program, not when it traces it: a program that is compiled ahead for
another device, or exported for several, has the implementation for that device.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PrecisionLike


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    dimension_numbers: jax.lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    precision: PrecisionLike = None,
    **kwargs,
) -> jax.Array:
    """Convolves NHWC by HWIO, on CPUs as one matrix product where that is faster.

    It is faster for 1x1 kernels, and where the output has fewer positions than the kernel. For the
    latter XLA for CPUs has only a naive loop (20 times slower), and the operand of the product,
    which is the pixels under the kernel side by side, is small. On TPUs and GPUs the slices and
    reshapes around a product would cost passes over memory. Arguments are those of
    `jax.lax.conv_general_dilated`, as `nnx.Conv` passes them.
    """
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
        **kwargs,
    )
    plain = (
        feature_group_count == 1
        and tuple(lhs_dilation) == (1, 1)
        and all(isinstance(size, int) for size in lhs.shape[1:3])  # not symbolic, as in an export
        and all(value is None for value in kwargs.values())  # no sharding or dtype of the output
    )
    if not plain:
        return convolve(lhs, rhs)
    kernel_size = rhs.shape[:2]
    window = [(size - 1) * d + 1 for size, d in zip(kernel_size, rhs_dilation, strict=True)]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[1:3], window, window_strides, padding)
    steps = [  # from the first position of the window to the last
        size + sum(pads) - extent
        for size, pads, extent in zip(lhs.shape[1:3], padding, window, strict=True)
    ]
    positions = [step // stride + 1 for step, stride in zip(steps, window_strides, strict=True)]
    small = math.prod(positions) < math.prod(kernel_size)
    if min(steps) < 0 or not (small or kernel_size == (1, 1)):
        return convolve(lhs, rhs)

    def multiply(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        x = jax.lax.pad(
            lhs,
            jnp.zeros((), lhs.dtype),
            [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)],
        )
        patches = []
        for offset in itertools.product(*map(range, kernel_size)):
            rows, columns = (
                slice(d * index, d * index + step + 1, stride)
                for index, d, step, stride in zip(
                    offset, rhs_dilation, steps, window_strides, strict=True
                )
            )
            patches.append(x[:, rows, columns])
        x = jnp.concatenate(patches, axis=-1)
        # Reshaped to two axes first: for a product of three, XLA for CPUs copies the gradient.
        rows, kernel = math.prod(x.shape[:-1]), rhs.reshape(x.shape[-1], rhs.shape[-1])
        y = jnp.matmul(x.reshape(rows, x.shape[-1]), kernel, precision=precision)
        return y.reshape(*x.shape[:-1], rhs.shape[-1])

    return jax.lax.platform_dependent(lhs, rhs, cpu=multiply, default=convolve)


def max_pool(x: jax.Array) -> jax.Array:
    """Takes 3x3 maxima at stride 2, padded by 1.

    Maps (..., H, W, C) to (..., (H + 1) // 2, (W + 1) // 2, C). The gradient goes to the first of
    equal maxima. TPUs have an instruction for the gradient of a pool. On CPUs and GPUs XLA does a
    search and a scatter, which is slow, so for them the pool consists of pairwise maxima (whose
    gradient goes to a NaN, if there is one).
    """
    return jax.lax.platform_dependent(x, tpu=_pool_window, default=_pool_slices)


def _pool_window(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def _pool_slices(x: jax.Array) -> jax.Array:
    lowest = jnp.array(-jnp.inf, x.dtype)
    for axis in (x.ndim - 2, x.ndim - 3):  # along the rows first, in the order of the window
        size = (x.shape[axis] + 1) // 2
        pads = [(0, 0, 0)] * x.ndim
        # Pads the end so that the three slices have the same size.
        pads[axis] = (1, 2 * size + 1 - x.shape[axis], 0)
        x = jax.lax.pad(x, lowest, pads)
        first, second, third = (
            jax.lax.slice_in_dim(x, offset, offset + 2 * size, stride=2, axis=axis)
            for offset in range(3)
        )
        x = _larger(_larger(first, second), third)
    return x


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the larger of two, the first if they are equal, or a NaN if there is one."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)
