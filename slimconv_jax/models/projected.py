"""SlimConv with its width restored, as a replacement for any 3x3 convolution."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes as nnx_dtypes
from flax.typing import Initializer

from slimconv_jax.errors import InputError
from slimconv_jax.models.complexity import count_params
from slimconv_jax.models.layers import kaiming_normal
from slimconv_jax.models.mode import told
from slimconv_jax.models.operations import conv_general_dilated
from slimconv_jax.models.slimconv import SlimConv


class ProjectedSlimConv(nnx.Module):
    """SlimConv, ReLU, and a 1x1 convolution to any number of channels.

    To the module around it, it looks like the 3x3 convolution that it replaces: it has the
    attributes of `nnx.Conv` except the kernel, and the same call. Its batch norms follow the mode
    that calls of the modules around it set (see `slimconv_jax.slimify`), and otherwise `train` and
    `eval`.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      use_bias: whether the 1x1 convolution has a bias.
      bias_init: its initialiser.
      bias_metadata: of the bias, such as its sharding (see `nnx.Conv`).
      kernel_init: initialiser of the kernels of all convolutions.
      project_init: initialiser of the kernel of the 1x1 convolution; `kernel_init` if None.
      kernel_metadata: of the kernels of all convolutions, such as their sharding (see `nnx.Conv`).
      rngs: source of the initial parameters.
      **slimconv: the other arguments of `SlimConv`. The 1x1 convolution has the same `precision`,
        `dtype` and `param_dtype`.

    Raises:
      ValueError: as `SlimConv`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        bias_init: Initializer = jax.nn.initializers.zeros,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        kernel_init: Initializer = kaiming_normal,
        project_init: Initializer | None = None,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs,
        **slimconv,
    ):
        common = {"kernel_metadata": kernel_metadata, "rngs": rngs}
        self.slimconv = SlimConv(in_features, kernel_init=kernel_init, **slimconv, **common)
        conv = self.slimconv.upper.conv
        self.dtype, self.param_dtype, self.precision = conv.dtype, conv.param_dtype, conv.precision
        self.project = nnx.Conv(
            self.slimconv.out_features,
            out_features,
            (1, 1),
            use_bias=use_bias,
            kernel_init=kernel_init if project_init is None else project_init,
            bias_init=bias_init,
            bias_metadata=bias_metadata,
            conv_general_dilated=conv_general_dilated,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            **common,
        )
        self.in_features, self.out_features, self.use_bias = in_features, out_features, use_bias
        self.kernel_size, self.input_dilation, self.mask = (3, 3), 1, None
        self.strides, self.padding = conv.strides, conv.padding
        self.kernel_dilation = conv.kernel_dilation
        self.feature_group_count = conv.feature_group_count

    @property
    def bias(self) -> nnx.Param | None:
        """The bias of the 1x1 convolution."""
        return self.project.bias

    def __call__(
        self,
        inputs: jax.Array,
        out_sharding: Any = None,
        *,
        use_running_average: bool | None = None,
    ) -> jax.Array:
        """Maps (..., H, W, in_features) to (..., H', W', out_features).

        Args:
          inputs: as in `nnx.Conv`.
          out_sharding: as in `nnx.Conv`.
          use_running_average: see `SlimConv`.
        """
        if use_running_average is None:
            use_running_average = told.value
        features = nnx.relu(self.slimconv(inputs, use_running_average))
        return self.project(features, out_sharding=out_sharding)


def replacement(
    conv: nnx.Conv | nn.Conv,
    in_features: int,
    out_features: int,
    *,
    reduction: int,
    rngs: nnx.Rngs,
    may_grow: bool = False,
    **options,
) -> ProjectedSlimConv:
    """Builds a replacement for a 3x3 convolution, with its settings.

    Args:
      conv: the convolution, of NNX or Linen.
      in_features: channels of its input.
      out_features: channels of its output.
      reduction: r of the SlimConv.
      rngs: source of the initial parameters.
      may_grow: whether the replacement may be larger than the convolution.
      **options: more arguments of `ProjectedSlimConv`.

    Raises:
      ValueError: if no replacement exists, or none that is smaller; the message says why.
    """
    promote_dtype = (nnx_dtypes if isinstance(conv, nnx.Conv) else linen_dtypes).promote_dtype
    unusual = {
        "an input dilation": np.any(np.array(conv.input_dilation or 1) != 1),
        "a mask": conv.mask is not None,
        "its own promote_dtype": conv.promote_dtype is not promote_dtype,
        "its own conv_general_dilated": (
            conv.conv_general_dilated
            not in (None, jax.lax.conv_general_dilated, conv_general_dilated)
            or getattr(conv, "conv_general_dilated_cls", None) is not None
        ),
        "a preferred_element_type": getattr(conv, "preferred_element_type", None) is not None,
    }
    for what, is_so in unusual.items():
        if is_so:
            raise InputError(f"it has {what}, which SlimConv does not have")
    module = ProjectedSlimConv(
        in_features,
        out_features,
        reduction=reduction,
        strides=1 if conv.strides is None else conv.strides,
        kernel_dilation=1 if conv.kernel_dilation is None else conv.kernel_dilation,
        padding=conv.padding,
        feature_group_count=conv.feature_group_count,
        use_bias=conv.use_bias,
        precision=conv.precision,
        dtype=conv.dtype,
        param_dtype=conv.param_dtype,
        rngs=rngs,
        **options,
    )
    if not may_grow:
        params = count_conv_params(conv, in_features), count_params(module)
        kernel = params[0] - conv.use_bias * out_features  # one multiply-add each per output pixel
        macs = kernel, _macs_per_pixel(module)
        counts = {"parameters": params, "multiply-adds per output pixel": macs}
        for what, (before, after) in counts.items():
            if after >= before:
                raise InputError(f"SlimConv would have {after:,} {what} instead of {before:,}")
    return module


def count_conv_params(conv: nnx.Conv | nn.Conv, in_features: int) -> int:
    """Counts the parameters of a 3x3 convolution of NNX or Linen."""
    out_features = conv.out_features if isinstance(conv, nnx.Conv) else conv.features
    kernel = 9 * (in_features // conv.feature_group_count) * out_features
    return kernel + conv.use_bias * out_features


def _macs_per_pixel(module: ProjectedSlimConv) -> int:
    """Counts the multiply-adds per output pixel, without those of the gate, which are few."""
    unit = module.slimconv
    # Before the stride, there are more pixels.
    before_strides = math.prod(np.broadcast_to(module.strides, 2).tolist())
    after = sum(layer.kernel.size for layer in (unit.upper.conv, unit.lower.conv, module.project))
    return after + before_strides * unit.lower_reduce.conv.kernel.size
