"""Parts that SlimConv and the ResNets share: initialisers, convolution, batch norm."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike

from slimconv_jax.errors import InputError
from slimconv_jax.models.mode import running_average
from slimconv_jax.models.operations import conv_general_dilated

kaiming_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal with variance 2 / fan_out: PyTorch's `kaiming_normal_(mode="fan_out")`."""


def at_least_float32(dtype: Dtype) -> jnp.dtype:
    """Returns a floating-point dtype, or float32 for a shorter one."""
    # Not `jnp.promote_types`, which raises if the user has switched on strict promotion.
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)


def uniform_fan_in(fan_in: int) -> Initializer:
    """Returns a uniform initialiser in +-1/sqrt(fan_in), PyTorch's default for linear layers."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class BatchNorm(nnx.BatchNorm):
    """Batch norm with the paper's settings: momentum 0.9, epsilon 1e-5.

    It differs from its base class in three ways:

    - With a `dtype`, only the input and the output have it: statistics, scale and bias enter the
      arithmetic in float32, in evaluation too.
    - One pass over the input computes both statistics. It subtracts the running mean first, so that
      the variance does not cancel once the running mean is about right; until then it is as
      accurate as that of the base class, E[x^2] - E[x]^2. (On a map of one pixel, as in the gates,
      it subtracts the mean itself, as PyTorch does: for so few inputs a second pass is free.)
    - It replaces the running statistics as a whole. With jax 0.10 and flax 0.12.8 the base class's
      `mean[...] = ` looks for the sharding of a tracer, for which JAX walks the whole program
      traced so far, so that tracing takes time quadratic in the depth (sc_resnet101: 25 s instead
      of 1 s).

    Args:
      features: channels, the last axis of the input.
      momentum: share of the running average that each batch keeps.
      epsilon: added to the variance.
      scale_init: initialiser of the scale.
      axis_name: of the devices whose inputs are one batch, under `jax.shard_map` and the like.
      axis_index_groups: groups of those devices; the inputs of each group are one batch.
      dtype: dtype of the output; inferred from input and parameters if None.
      param_dtype: dtype of scale and bias; the statistics are float32.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        scale_init: Initializer = jax.nn.initializers.ones,
        axis_name: str | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            features,
            momentum=momentum,
            epsilon=epsilon,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Normalises (..., features), over the whole batch in training mode."""
        return normalize([self], [x], use_running_average)


@jax.named_scope("norm")
def normalize(
    norms: Sequence[BatchNorm],
    parts: Sequence[jax.Array],
    use_running_average: bool | None = None,
) -> jax.Array:
    """Normalises the inputs of several batch norms in one pass, and concatenates the results.

    Args:
      norms: batch norms of the same settings (see `mergeable`).
      parts: the input of each, (..., features).
      use_running_average: overrides that of the norms, unless None.
    """
    norm = norms[0]
    use_running_average = _mode(norm, use_running_average)
    mean, var, scale, bias = (
        jnp.concatenate([getattr(norm, name)[...] for norm in norms])
        for name in ("mean", "var", "scale", "bias")
    )
    x = jnp.concatenate(parts, axis=-1)
    dtype = jnp.result_type(x, scale) if norm.dtype is None else norm.dtype
    wide = at_least_float32(dtype)
    axes = tuple(range(x.ndim - 1))
    along_channels = functools.partial(jnp.expand_dims, axis=axes)
    split = functools.partial(
        jnp.split,
        indices_or_sections=list(itertools.accumulate(norm.num_features for norm in norms[:-1])),
    )

    def over_devices(mean: jax.Array) -> jax.Array:
        if norm.axis_name is None:
            return mean
        return jax.lax.pmean(mean, norm.axis_name, axis_index_groups=norm.axis_index_groups)

    shift, offset = mean, 0.0
    if not use_running_average and x.size == x.shape[0] * x.shape[-1]:
        shift = over_devices(x.astype(wide).mean(axes))
    shift = jax.lax.stop_gradient(shift)  # the results do not depend on the shift
    if not use_running_average:
        # For each part by itself, so that XLA can fuse the sums into what computes the part.
        shifted = [
            part.astype(wide) - along_channels(s)
            for part, s in zip(parts, split(shift), strict=True)
        ]
        moments = [jnp.stack([part.mean(axes), jnp.square(part).mean(axes)]) for part in shifted]
        # For all of them together, in one collective.
        offset, mean_square = over_devices(jnp.concatenate(moments, axis=-1))
        batch_mean, batch_var = shift + offset, jnp.maximum(mean_square - jnp.square(offset), 0)
        running_mean = norm.momentum * mean + (1 - norm.momentum) * batch_mean
        running_var = norm.momentum * var + (1 - norm.momentum) * batch_var
        for each, m, v in zip(norms, split(running_mean), split(running_var), strict=True):
            # In their own dtype, whatever that of the input: the carry of a loop must not change.
            each.mean.set_value(m.astype(each.mean.dtype))
            each.var.set_value(v.astype(each.var.dtype))
        var = batch_var
    # One product and one sum, for which the backward pass needs two sums over the input.
    factor = jax.lax.rsqrt(var + norm.epsilon) * scale
    centred = x.astype(wide) - along_channels(shift)
    return (centred * along_channels(factor) + along_channels(bias - offset * factor)).astype(dtype)


def _mode(norm: nnx.BatchNorm, use_running_average: bool | None) -> bool:
    """Returns the mode of the call, else of the SlimConv around it, else of the norm itself."""
    for mode in (use_running_average, running_average.value, norm.use_running_average):
        if mode is not None:
            return mode
    raise InputError("batch norm needs use_running_average, as an attribute or in the call")


def leave_devices(model: nnx.Module) -> None:
    """Makes each batch norm of a model use its own input only, not that of other devices."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.axis_name = None


def mergeable(norms: Sequence[nnx.Module]) -> bool:
    """Returns whether the norms are in training mode and `normalize` can take them together."""
    if not all(type(norm) is BatchNorm and not _mode(norm, None) for norm in norms):
        return False
    settings = ("momentum", "epsilon", "dtype", "axis_name", "axis_index_groups")
    return all(
        getattr(norm, name) == getattr(norms[0], name) for norm in norms for name in settings
    )


class ConvBN(nnx.Module):
    """A square convolution without bias, then batch norm; no activation.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: side of the kernel, odd.
      strides: one stride, or one for each of height and width.
      kernel_dilation: one dilation, or one for each of height and width.
      padding: as in `nnx.Conv`. None is symmetric, `kernel_dilation * (kernel_size - 1) / 2`
        on each side, as in PyTorch; XLA's "SAME" pads unevenly at stride 2.
      feature_group_count: groups; must divide both channel counts.
      kernel_init: initialiser of the kernel.
      kernel_metadata: of the kernel, such as its sharding (see `nnx.Conv`).
      precision: of the convolution (see `nnx.Conv`).
      dtype: dtype of the computation; inferred from input and parameters if None.
      param_dtype: dtype of the parameters.
      rngs: source of the initial parameters.
      **norm: momentum, epsilon, scale_init, axis_name and axis_index_groups of the `BatchNorm`.
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
        kernel_init: Initializer = kaiming_normal,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        precision: PrecisionLike = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **norm,
    ):
        dilation = tuple(np.broadcast_to(kernel_dilation, 2).tolist())
        if padding is None:
            padding = tuple((d * (kernel_size - 1) // 2,) * 2 for d in dilation)
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.conv = nnx.Conv(
            in_features,
            out_features,
            (kernel_size, kernel_size),
            strides=strides,
            padding=padding,
            kernel_dilation=dilation,
            feature_group_count=feature_group_count,
            use_bias=False,
            kernel_init=kernel_init,
            kernel_metadata=kernel_metadata,
            conv_general_dilated=conv_general_dilated,
            precision=precision,
            **dtypes,
            rngs=rngs,
        )
        self.bn = BatchNorm(out_features, **norm, **dtypes, rngs=rngs)
        self.out_features = out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., H, W, in_features) to (..., H', W', out_features)."""
        return self.bn(self.conv(x))
