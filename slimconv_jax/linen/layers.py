"""SlimConv for Linen, alone and where a convolution stood."""

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

    The channels C of the input are those that it is called with; it returns C // r + C // 2r.
    No activation: apply ReLU next.

    Attributes:
      k: see `slimconv_jax.SlimConv`, as for all others. A `kernel_init` of
        `nn.with_partitioning` is that of the three convolutions, too.
      train: whether batch norm uses and records the statistics of this batch, for which
        "batch_stats" must be mutable; to be given here or in the call, as the mode of
        `nn.BatchNorm`, but for `init`.
    """

    k: CompressionRatio | None = None
    reduction: int | None = None
    strides: int | Sequence[int] = 1
    kernel_dilation: int | Sequence[int] = 1
    padding: PaddingLike | None = None
    feature_group_count: int = 1
    lower_feature_group_count: int | None = None
    squeeze_ratio: int = 32
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
        return run_module(
            self,
            build,
            lambda: abstract(build),
            lambda unit: unit(x),
            mode_of(self, train),
            boxes_of(kernel=self.kernel_init),
        )


class SlimmedConv(nn.Conv):
    """`nn.Conv` with SlimConv inside: stands where a network takes a class of convolutions.

        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        conv = functools.partial(slimconv_jax.linen.SlimmedConv, k="4/3", train=train)

    A convolution of 3x3 becomes SlimConv, ReLU and a 1x1 convolution that restores the width. It
    stays a convolution, and so does every other one, where SlimConv cannot be or would be larger.

    Attributes:
      features: see `nn.Conv`, as for all others but these. In a SlimConv, the bias and its
        initialiser are those of the 1x1 convolution, and so is a `kernel_init` that is given.
      k: compression ratio, as the next ones see `slimconv_jax.SlimConv`.
      momentum: of the batch norms.
      epsilon: of the batch norms.
      axis_name: of the batch norms.
      train: see `SlimConv`; in a network of `slimify`, the mode that the network is told.
    """

    k: CompressionRatio = "4/3"
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    train: bool | None = None

    def __call__(self, inputs: jax.Array, train: bool | None = None) -> jax.Array:
        """Maps (..., H, W, C) to (..., H', W', features).

        Args:
          inputs: as of `nn.Conv`.
          train: see the attribute.

        Raises:
          ValueError: if k is none, or `train` is not given, or the variables are not those that
            there should be.
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
    """The settings of the batch norms that a module makes."""
    return {name: getattr(module, name) for name in ("momentum", "epsilon", "axis_name")}


def is_3x3(conv: nn.Conv) -> bool:
    return not isinstance(conv.kernel_size, int) and tuple(conv.kernel_size) == (3, 3)


def replacement_of(
    conv: nn.Conv, inputs: jax.Array, reduction: int, norm: dict[str, Any]
) -> tuple[Callable[..., ProjectedSlimConv], ProjectedSlimConv]:
    """What takes the place of a convolution: the function that makes it, and its outline.

    Raises:
      ValueError: if there is nothing; the message says why.
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
    """The output of what takes the place of a convolution."""
    boxes = boxes_of(kernel=conv.kernel_init, bias=conv.bias_init)
    return run_module(conv, build, lambda: outline, lambda m: m(inputs), train, boxes)
