"""The pieces that SlimConv and the ResNets share: initialisers, convolution, batch norm."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer, PaddingLike

from slimconv_jax.models.operations import conv_general_dilated

kaiming_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal with variance 2 / fan_out: PyTorch's `kaiming_normal_(mode="fan_out")`."""


def uniform_fan_in(fan_in: int) -> Initializer:
    """Uniform in +-1/sqrt(fan_in), PyTorch's default for linear layers and biases."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


SMALL = 2**20
"""So many numbers stay in a device's caches, where a second pass over them is free."""


class BatchNorm(nnx.BatchNorm):
    """Batch norm as everywhere in the paper: epsilon 1e-5, running average kept at 0.9.

    It differs from its base class in three ways. With a `dtype`, only the input and the output
    have it: statistics, scale and bias enter the arithmetic in float32, in evaluation too. The
    variance does not cancel, where the base class by default has E[x^2] - E[x]^2: both statistics
    come from one pass over the input, in which the running mean is subtracted first. (Of an input
    so small that it can be read twice for nothing, such as the global averages that the gates
    see, it is the mean itself, as in PyTorch.) And the running statistics are replaced as a whole:
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

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Normalises (..., features), over the whole batch in training mode."""
        if use_running_average is None:
            use_running_average = self.use_running_average
        mean, var, scale, bias = (v[...] for v in (self.mean, self.var, self.scale, self.bias))
        dtype = jnp.result_type(x, scale) if self.dtype is None else self.dtype
        x = x.astype(jnp.promote_types(dtype, jnp.float32))
        axes = tuple(range(x.ndim - 1))
        shift, offset = mean, 0.0
        if not use_running_average and x.size <= SMALL:
            shift = x.mean(axes)
        x -= jax.lax.stop_gradient(shift)  # whatever is subtracted, the results are the same
        if not use_running_average:
            offset = x.mean(axes)
            var_of_batch = jnp.maximum(jnp.square(x).mean(axes) - jnp.square(offset), 0)
            self.mean.set_value(self.momentum * mean + (1 - self.momentum) * (shift + offset))
            self.var.set_value(self.momentum * var + (1 - self.momentum) * var_of_batch)
            var = var_of_batch
        # One product and one sum, of which the backward pass needs two sums over the input.
        factor = jax.lax.rsqrt(var + self.epsilon) * scale
        return (x * factor + (bias - offset * factor)).astype(dtype)


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
