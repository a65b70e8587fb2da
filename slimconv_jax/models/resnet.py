"""ResNet and Sc-ResNet: blocks, stem, stages and head (paper, section III-C; SPEC section 2).

One skeleton serves the whole family. With a `reduction` the 3x3 convolution of every
bottleneck is a SlimConv; without, it is a plain convolution and the network a plain
ResNet, ResNeXt or Wide ResNet.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.models.layers import ConvBN, max_pool, uniform_fan_in
from slimconv_jax.models.slimconv import SlimConv

STEMS = {"imagenet": 4, "cifar": 1}
"""The stems, and the stride of the feature maps of the first stage with each."""


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Everything that fixes the parameters' shapes and the function they compute.

    Attributes:
      blocks: residual blocks in each of the four stages.
      block: "bottleneck" or "basic"; a basic block has no SlimConv, since SlimConv needs
        the 1x1 convolution that follows it in a bottleneck.
      groups: groups of the 3x3 convolutions, in SlimConv those of the upper path.
      base_width: channels per group of a bottleneck's 3x3 convolution in the first stage,
        at the standard `width` of 64 (ResNeXt's "4d").
      reduction: r of every SlimConv; None for plain 3x3 convolutions.
      lower_groups: groups of SlimConv's lower 3x3 convolution; `groups` if None.
      num_classes: outputs of the classifier; 0 for none, which leaves the pooled features.
      width: channels of the stem and planes of the first stage; the stages have 1, 2, 4
        and 8 times as many planes.
      stem: "imagenet" (7x7 convolution at stride 2, 3x3 max pool at stride 2) or "cifar"
        (3x3 convolution at stride 1) for small images.
      dilation: for each of stages 2, 3 and 4, whether dilation replaces its stride, which
        keeps the feature maps large for dense prediction.

    Raises:
      ValueError: if a value is not one of those.
    """

    blocks: tuple[int, int, int, int]
    block: str = "bottleneck"
    groups: int = 1
    base_width: int = 64
    reduction: int | None = None
    lower_groups: int | None = None
    num_classes: int = 1000
    width: int = 64
    stem: str = "imagenet"
    dilation: tuple[bool, bool, bool] = (False, False, False)

    def __post_init__(self):
        for name, least in (("num_classes", 0), ("width", 1), ("groups", 1), ("base_width", 1)):
            require_integer(name, getattr(self, name), least)
        if self.block not in BLOCKS:
            raise InputError(f"block={self.block!r} must be one of {', '.join(map(repr, BLOCKS))}")
        if self.block == "basic" and self.reduction is not None:
            raise InputError("a basic block has no SlimConv, so it takes no reduction")
        if self.block == "bottleneck" and self.width * self.base_width < 64:
            raise InputError(
                f"width={self.width} with base_width={self.base_width} leaves the bottlenecks no "
                f"channels; width must be at least {math.ceil(64 / self.base_width)}"
            )
        if self.stem not in STEMS:
            raise InputError(f"stem={self.stem!r} must be one of {', '.join(map(repr, STEMS))}")
        dilation = self.dilation if isinstance(self.dilation, tuple) else ()
        if len(dilation) != 3 or not all(isinstance(d, bool) for d in dilation):
            raise InputError(
                f"dilation={self.dilation!r} must be three booleans, one for each of stages 2, 3 "
                "and 4: whether dilation replaces the stride"
            )


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut, the block of ResNet-18 and -34."""

    expansion = 1

    def __init__(
        self,
        in_features: int,
        planes: int,
        config: ResNetConfig,
        *,
        strides: int,
        dilation: int,
        scale_init: Initializer,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        common = {"kernel_dilation": dilation, "dtype": dtype, "rngs": rngs}
        self.conv1 = ConvBN(in_features, planes, 3, strides=strides, **common)
        self.conv2 = ConvBN(planes, planes, 3, scale_init=scale_init, **common)
        self.shortcut = _shortcut(in_features, planes, strides, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, in_features) to (N, H', W', planes)."""
        y = self.conv2(nnx.relu(self.conv1(x)))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Bottleneck(nnx.Module):
    """1x1 convolution, SlimConv or 3x3 convolution, 1x1 convolution, and a shortcut.

    The stride sits in the middle (ResNet v1.5).
    """

    expansion = 4

    def __init__(
        self,
        in_features: int,
        planes: int,
        config: ResNetConfig,
        *,
        strides: int,
        dilation: int,
        scale_init: Initializer,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        common = {"dtype": dtype, "rngs": rngs}
        middle = common | {
            "strides": strides,
            "kernel_dilation": dilation,
            "feature_group_count": config.groups,
        }
        width = int(planes * config.base_width / 64) * config.groups
        out_features = self.expansion * planes
        self.conv1 = ConvBN(in_features, width, 1, **common)
        if config.reduction is None:
            self.conv2 = ConvBN(width, width, 3, **middle)
        else:
            self.conv2 = SlimConv(
                width,
                reduction=config.reduction,
                lower_feature_group_count=config.lower_groups,
                **middle,
            )
        self.conv3 = ConvBN(
            self.conv2.out_features, out_features, 1, scale_init=scale_init, **common
        )
        self.shortcut = _shortcut(in_features, out_features, strides, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, in_features) to (N, H', W', 4 * planes)."""
        y = nnx.relu(self.conv1(x))
        y = nnx.relu(self.conv2(y))
        y = self.conv3(y)
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


def _shortcut(
    in_features: int, out_features: int, strides: int, dtype: Dtype | None, rngs: nnx.Rngs
) -> ConvBN | None:
    """A 1x1 convolution where the block changes the shape, None (identity) elsewhere."""
    if strides == 1 and in_features == out_features:
        return None
    return ConvBN(in_features, out_features, 1, strides=strides, dtype=dtype, rngs=rngs)


def as_dtype(dtype: Dtype | None) -> jnp.dtype | None:
    """The one form of a dtype, None for none.

    Raises:
      ValueError: if it is no floating-point dtype.
    """
    try:
        known = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        known = jnp.dtype(int)
    if known is not None and not jnp.issubdtype(known, jnp.floating):
        raise InputError(f"dtype={dtype!r} is no dtype of the computation, such as 'bfloat16'")
    return known


class ResNet(nnx.Module):
    """A ResNet or Sc-ResNet classifier; `create_model` builds the named ones.

    Args:
      config: the architecture.
      zero_init_residual: whether the last batch norm of each residual branch starts with
        scale 0, so that every block starts as its shortcut.
      remat: whether training keeps only the output of each block and computes the rest once more
        in the backward pass, which takes less memory and more time.
      dtype: dtype of the computation (bfloat16 on accelerators); inferred from input and
        parameters if None. Parameters and batch statistics are float32, and so is the
        classifier's arithmetic.
      rngs: source of the initial parameters.

    Attributes:
      config: the architecture.

    Raises:
      ValueError: if a SlimConv of the architecture cannot exist (see `SlimConv`), or if
        `dtype` is no dtype.
    """

    def __init__(
        self,
        config: ResNetConfig,
        *,
        zero_init_residual: bool = False,
        remat: bool = False,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        if not isinstance(remat, bool):
            raise InputError(f"remat={remat!r} must be True or False")
        self.config = config
        self.remat = remat
        dtype = as_dtype(dtype)
        if config.stem == "imagenet":
            self.stem = ConvBN(3, config.width, 7, strides=2, dtype=dtype, rngs=rngs)
        else:
            self.stem = ConvBN(3, config.width, 3, dtype=dtype, rngs=rngs)

        block_type = BLOCKS[config.block]
        init = jax.nn.initializers
        scale_init = init.zeros if zero_init_residual else init.ones
        features, dilation = config.width, 1
        self.stages = nnx.List()
        for stage, num_blocks in enumerate(config.blocks):
            planes = config.width * 2**stage
            strides = 1 if stage == 0 else 2
            # As in torchvision, the block in which dilation replaces the stride still
            # has the dilation of the stage before.
            first_dilation = dilation
            if stage > 0 and config.dilation[stage - 1]:
                dilation, strides = dilation * strides, 1
            blocks = nnx.List()
            for index in range(num_blocks):
                block = block_type(
                    features,
                    planes,
                    config,
                    strides=strides if index == 0 else 1,
                    dilation=first_dilation if index == 0 else dilation,
                    scale_init=scale_init,
                    dtype=dtype,
                    rngs=rngs,
                )
                blocks.append(block)
                features = block_type.expansion * planes
            self.stages.append(blocks)

        if not config.num_classes:
            self.classifier = nnx.data(None)
        else:
            self.classifier = nnx.Linear(
                features,
                config.num_classes,
                kernel_init=uniform_fan_in(features),
                bias_init=uniform_fan_in(features),
                rngs=rngs,
            )

    def features(self, x: jax.Array) -> list[jax.Array]:
        """The output of each stage for images (N, H, W, 3), float and normalised.

        Four maps (N, H', W', C'), at strides 4, 8, 16 and 32 with the "imagenet" stem, at
        1, 2, 4 and 8 with the "cifar" stem; a dilated stage keeps the stride before it.
        """
        x = nnx.relu(self.stem(x))
        if self.config.stem == "imagenet":
            x = max_pool(x)
        return self.stage_outputs(x)

    def stage_outputs(self, x: jax.Array) -> list[jax.Array]:
        """The output of each stage for the output (N, H, W, width) of the stem and its pool."""
        maps = []
        for blocks in self.stages:
            for block in blocks:
                x = nnx.remat(type(block).__call__)(block, x) if self.remat else block(x)
            maps.append(x)
        return maps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (N, num_classes) of images (N, H, W, 3), float and normalised.

        Without classes, the pooled features (N, C). At least float32, whatever the `dtype` of
        the computation.
        """
        return self.head(self.features(x)[-1])

    def head(self, x: jax.Array) -> jax.Array:
        """Logits (N, num_classes), or pooled features, of the last feature map (N, H', W', C')."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean(axis=(1, 2))
        return x if self.classifier is None else self.classifier(x)
