"""The pieces that SlimConv and the ResNets share: initialisers, convolution, batch norm."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike

kaiming_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal with variance 2 / fan_out: PyTorch's `kaiming_normal_(mode="fan_out")`."""


def uniform_fan_in(fan_in: int) -> Initializer:
    """Uniform in +-1/sqrt(fan_in), PyTorch's default for linear layers and biases."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


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
    """`jax.lax.conv_general_dilated` of NHWC by HWIO, as one matrix product where that is faster.

    That is for 1x1 kernels, and where the output has fewer positions than the kernel. For those
    XLA for CPUs has but a naive loop (20 times slower), and what the product is of, the pixels
    under the kernel side by side, is small. Arguments are those of the original, as `nnx.Conv`
    gives them.
    """
    kernel_size = rhs.shape[:2]
    plain = (
        feature_group_count == 1
        and tuple(lhs_dilation) == (1, 1)
        and all(isinstance(size, int) for size in lhs.shape[1:3])  # not symbolic, as in an export
        and all(value is None for value in kwargs.values())  # no sharding or dtype of the output
    )
    if plain:
        window = [(size - 1) * d + 1 for size, d in zip(kernel_size, rhs_dilation, strict=True)]
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(lhs.shape[1:3], window, window_strides, padding)
        steps = [  # from the first position of the window to the last
            size + sum(pads) - extent
            for size, pads, extent in zip(lhs.shape[1:3], padding, window, strict=True)
        ]
        positions = [step // stride + 1 for step, stride in zip(steps, window_strides, strict=True)]
        small = math.prod(positions) < math.prod(kernel_size)
        plain = min(steps) >= 0 and (small or kernel_size == (1, 1))
    if not plain:
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            **kwargs,
        )
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
    # Two axes from the start: of a product over three, XLA for CPUs copies the gradient.
    rows, kernel = math.prod(x.shape[:-1]), rhs.reshape(x.shape[-1], rhs.shape[-1])
    y = jnp.matmul(x.reshape(rows, x.shape[-1]), kernel, precision=precision)
    return y.reshape(*x.shape[:-1], rhs.shape[-1])


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maxima at stride 2, padded by 1: (..., H, W, C) to (..., (H + 1) // 2, (W + 1) // 2, C).

    The same as `nnx.max_pool`, also in that the gradient goes to the first of equal maxima (it
    goes to what is not a number, if there is such). Put together of larger-of-two, since XLA's
    gradient of a pool is a scatter after a search, which is slow on CPUs.
    """
    lowest = jnp.array(-jnp.inf, x.dtype)
    for axis in (x.ndim - 2, x.ndim - 3):  # along the rows first, as in the order of the window
        size = (x.shape[axis] + 1) // 2
        pads = [(0, 0, 0)] * x.ndim
        # As many elements behind the last window as make three slices of the same size.
        pads[axis] = (1, 2 * size + 1 - x.shape[axis], 0)
        x = jax.lax.pad(x, lowest, pads)
        first, second, third = (
            jax.lax.slice_in_dim(x, offset, offset + 2 * size, stride=2, axis=axis)
            for offset in range(3)
        )
        x = _larger(_larger(first, second), third)
    return x


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """The larger of two, the first if they are equal, or what is not a number."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


class BatchNorm(nnx.BatchNorm):
    """Batch norm as everywhere in the paper: epsilon 1e-5, running average kept at 0.9.

    It differs from its base class in three ways. With a `dtype`, only the input and the
    output have it: statistics, scale and bias enter the arithmetic in float32, in
    evaluation too. The variance is the mean of (x - mean)^2, as PyTorch's, where the base
    class by default has E[x^2] - E[x]^2, which cancels: the gates' batch norm sees global averages,
    which differ little within a batch. And the running statistics are replaced as a whole:
    with jax 0.10 and flax 0.12.8 the base class's `mean[...] = ` looks for the sharding of a
    tracer, for which JAX walks the whole program traced so far, so that tracing takes time
    quadratic in the depth (sc_resnet101: 25 s in place of 1 s).

    Args:
      features: channels, the last axis of the input.
      scale_init: initialiser of the scale.
      dtype: dtype of the output; inferred from input and parameters if None.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        features: int,
        *,
        scale_init: Initializer = jax.nn.initializers.ones,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            features, momentum=0.9, epsilon=1e-5, scale_init=scale_init, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Normalises (..., features), over the whole batch in training mode."""
        if use_running_average is None:
            use_running_average = self.use_running_average
        mean, var, scale, bias = (v[...] for v in (self.mean, self.var, self.scale, self.bias))
        dtype = jnp.result_type(x, scale) if self.dtype is None else self.dtype
        x = x.astype(jnp.promote_types(dtype, jnp.float32))
        if not use_running_average:
            axes = tuple(range(x.ndim - 1))
            batch_mean = x.mean(axes)
            batch_var = jnp.square(x - batch_mean).mean(axes)
            self.mean.set_value(self.momentum * mean + (1 - self.momentum) * batch_mean)
            self.var.set_value(self.momentum * var + (1 - self.momentum) * batch_var)
            mean, var = batch_mean, batch_var
        return ((x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias).astype(dtype)


class ConvBN(nnx.Module):
    """A square convolution without bias, then batch norm; no activation.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: side of the kernel, odd.
      strides: one stride, or one for each of height and width.
      kernel_dilation: one dilation, or one for each of height and width.
      padding: as `nnx.Conv` has it. None is symmetric, `kernel_dilation * (kernel_size - 1) / 2`
        on each side, as in PyTorch; XLA's "SAME" pads unevenly at stride 2.
      feature_group_count: groups; must divide both channel counts.
      scale_init: initialiser of the batch norm's scale.
      dtype: dtype of the computation; inferred from input and parameters if None.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        strides: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        padding: PaddingLike | None = None,
        feature_group_count: int = 1,
        scale_init: Initializer = jax.nn.initializers.ones,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        dilation = tuple(np.broadcast_to(kernel_dilation, 2).tolist())
        if padding is None:
            padding = tuple((d * (kernel_size - 1) // 2,) * 2 for d in dilation)
        self.conv = nnx.Conv(
            in_features,
            out_features,
            (kernel_size, kernel_size),
            strides=strides,
            padding=padding,
            kernel_dilation=dilation,
            feature_group_count=feature_group_count,
            use_bias=False,
            kernel_init=kaiming_normal,
            conv_general_dilated=conv_general_dilated,
            dtype=dtype,
            rngs=rngs,
        )
        self.bn = BatchNorm(out_features, scale_init=scale_init, dtype=dtype, rngs=rngs)
        self.out_features = out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., H, W, in_features) to (..., H', W', out_features)."""
        return self.bn(self.conv(x))
