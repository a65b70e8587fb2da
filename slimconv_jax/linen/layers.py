"""SlimConv for Linen, alone and as a replacement for a convolution."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import linear
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike

from slimconv_jax.errors import InputError
from slimconv_jax.linen.bridge import boxes_of, mode_of, run_module, unboxed
from slimconv_jax.models import slimconv
from slimconv_jax.models.layers import kaiming_normal
from slimconv_jax.models.projected import ProjectedSlimConv, replacement
from slimconv_jax.models.slimconv import CompressionRatio, reduction_from_k
from slimconv_jax.models.zoo import abstract


class SlimConv(nn.Module):
    """`slimconv_jax.SlimConv` for Linen: the same unit, arguments and names.

    It takes the channels C from its input, and returns C // r + C // 2r channels.
    No activation: apply ReLU next.

    Attributes:
      k: see `slimconv_jax.SlimConv`, as for all others. A `kernel_init` of
        `nn.with_partitioning` applies to the three convolutions, too.
      train: whether batch norm uses and records the statistics of this batch, for which
        "batch_stats" must be mutable. Set it here or in the call, as the mode of `nn.BatchNorm`;
        `init` does not need it.
    """

    k: CompressionRatio | None = None
    reduction: int | None = None
    strides: int | Sequence[int] = 1
    kernel_dilation: int | Sequence[int] = 1
    padding: PaddingLike | None = None
    feature_group_count: int = 1
    lower_feature_group_count: int | None = None
    squeeze_ratio: int = 32
    min_squeezed: int = 1
    gating: str | None = "flipped"
    kernel_init: Initializer = kaiming_normal
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    precision: PrecisionLike = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    train: bool | None = None

    def __call__(self, x: jax.Array, train: bool | None = None) -> jax.Array:
        """Maps (..., H, W, C) to (..., H', W', C // r + C // 2r).

        Args:
          x: the input.
          train: see the attribute.

        Raises:
          ValueError: as `slimconv_jax.SlimConv`, or if `train` is not given, or the variables are
            not those of the unit.
        """
        options = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("parent", "name", "train")
        }
        options["kernel_init"] = unboxed(self.kernel_init)
        build = functools.partial(slimconv.SlimConv, x.shape[-1], **options)
        mode, boxes = mode_of(self, train), boxes_of(kernel=self.kernel_init)
        return run_module(self, build, abstract(build), lambda unit: unit(x), mode, boxes)


class SlimmedConv(nn.Conv):
    """`nn.Conv` with SlimConv inside, for networks that take the class of their convolutions.

        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        conv = functools.partial(slimconv_jax.linen.SlimmedConv, k="4/3", train=train)

    A 3x3 convolution becomes SlimConv, ReLU and a 1x1 convolution that restores the width. It stays
    a convolution if SlimConv is not possible or would be larger; so do all other convolutions.

    Attributes:
      features: see `nn.Conv`, as for all others except these. With SlimConv, the bias, its
        initialiser and any `kernel_init` are those of the 1x1 convolution.
      k: compression ratio; for this and the next ones see `slimconv_jax.SlimConv`.
      momentum: of the batch norms.
      epsilon: of the batch norms.
      axis_name: of the batch norms.
      train: see `SlimConv`; in a network of `slimify`, the mode that the network is called with.
    """

    k: CompressionRatio = "4/3"
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    train: bool | None = None

    def __call__(self, inputs: jax.Array, train: bool | None = None) -> jax.Array:
        """Maps (..., H, W, C) to (..., H', W', features).

        Args:
          inputs: as in `nn.Conv`.
          train: see the attribute.

        Raises:
          ValueError: if k is not a compression ratio, or `train` is not given, or the variables
            are not those of the layer.
        """
        reduction = reduction_from_k(self.k)
        if is_3x3(self):
            try:
                build, outline = replacement_of(self, inputs, reduction, norm_settings(self))
            except InputError:
                pass
            else:
                return run_replacement(self, build, outline, inputs, mode_of(self, train))
        return super().__call__(inputs)


def norm_settings(module: nn.Module) -> dict[str, Any]:
    """Returns the batch norm settings among the fields of a module."""
    return {name: getattr(module, name) for name in ("momentum", "epsilon", "axis_name")}


def is_3x3(conv: nn.Conv) -> bool:
    return not isinstance(conv.kernel_size, int) and tuple(conv.kernel_size) == (3, 3)


def replacement_of(
    conv: nn.Conv, inputs: jax.Array, reduction: int, norm: dict[str, Any]
) -> tuple[Callable[..., ProjectedSlimConv], ProjectedSlimConv]:
    """Returns the function that builds the replacement for a convolution, and its outline.

    Raises:
      ValueError: if no replacement exists; the message says why.
    """
    options = {"bias_init": unboxed(conv.bias_init), **norm}
    if conv.kernel_init is not linear.default_kernel_init:
        options["project_init"] = unboxed(conv.kernel_init)
    build = functools.partial(
        replacement, conv, inputs.shape[-1], conv.features, reduction=reduction, **options
    )
    return build, abstract(build)


def run_replacement(
    conv: nn.Conv,
    build: Callable[..., ProjectedSlimConv],
    outline: ProjectedSlimConv,
    inputs: jax.Array,
    train: bool,
) -> jax.Array:
    """Returns the output of the replacement for a convolution."""
    boxes = boxes_of(kernel=conv.kernel_init, bias=conv.bias_init)
    return run_module(conv, build, outline, lambda m: m(inputs), train, boxes)
