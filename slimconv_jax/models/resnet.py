"""ResNet and Sc-ResNet: blocks, stem, stages and head (paper, section III-C; SPEC section 2).

One skeleton serves the whole family. With a `reduction` the 3x3 convolution of every
bottleneck is a SlimConv; without, it is a plain convolution and the network a plain
ResNet, ResNeXt or Wide ResNet. The systems that the paper compares with are here, too: bottlenecks
with ghost modules instead of convolutions, and networks with individual channels for each block.
"""

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from slimconv_jax.errors import InputError, require_choice, require_integer
from slimconv_jax.models.ghost import GhostConvBN
from slimconv_jax.models.layers import ConvBN, at_least_float32, kaiming_normal, uniform_fan_in
from slimconv_jax.models.operations import max_pool
from slimconv_jax.models.slimconv import GATINGS, SlimConv

_MOST_BLOCKS = 200
"""The limit per stage. ResNet-152 has 36; a model of thousands takes minutes to build."""

STEMS = {"imagenet": 4, "cifar": 1}
"""The stems, each with the stride of the first stage's feature maps."""


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Everything that determines the parameters' shapes and the function they compute.

    Attributes:
      blocks: residual blocks in each of the four stages.
      block: "bottleneck"; "basic", which has no SlimConv, since SlimConv needs the 1x1 convolution
        that follows it in a bottleneck; "ghost", a bottleneck whose convolutions are ghost
        modules; or "se", a bottleneck with squeeze-and-excitation of its output.
      groups: groups of the 3x3 convolutions, in SlimConv those of the upper path.
      base_width: channels per group of a bottleneck's 3x3 convolution in the first stage,
        at the standard `width` of 64 (ResNeXt's "4d").
      reduction: r of every SlimConv; None for plain 3x3 convolutions.
      lower_groups: groups of SlimConv's lower 3x3 convolution; `groups` if None.
      squeeze_ratio: channels per squeezed channel in the gate of every SlimConv.
      min_squeezed: minimum number of squeezed channels.
      gating: "flipped" as in the paper, "plain", "upper" or None; see `SlimConv`.
      sc_stages: for each stage, whether its blocks have SlimConv; the others have plain 3x3
        convolutions.
      num_classes: outputs of the classifier; 0 for none, which leaves the pooled features.
      width: channels of the stem and planes of the first stage; the stages have 1, 2, 4
        and 8 times as many planes.
      stem: "imagenet" (7x7 convolution at stride 2, 3x3 max pool at stride 2) or "cifar"
        (3x3 convolution at stride 1) for small images.
      dilation: for each of stages 2, 3 and 4, whether dilation replaces its stride, which
        keeps the feature maps large for dense prediction.
      channels: for networks whose widths a search has found, the channels of the stem, and for each
        block of each stage those of its three convolutions' outputs, at the standard `width`;
        None for the regular widths. For plain bottlenecks; the last is the same in a stage.

    Raises:
      ValueError: if a value is not allowed.
    """

    blocks: tuple[int, int, int, int]
    block: str = "bottleneck"
    groups: int = 1
    base_width: int = 64
    reduction: int | None = None
    lower_groups: int | None = None
    squeeze_ratio: int = 32
    min_squeezed: int = 1
    gating: str | None = "flipped"
    sc_stages: tuple[bool, bool, bool, bool] = (True, True, True, True)
    num_classes: int = 1000
    width: int = 64
    stem: str = "imagenet"
    dilation: tuple[bool, bool, bool] = (False, False, False)
    channels: tuple[int, tuple[tuple[tuple[int, int, int], ...], ...]] | None = None

    def __post_init__(self):
        for name in ("width", "groups", "base_width", "squeeze_ratio", "min_squeezed"):
            require_integer(name, getattr(self, name), 1, 2**12)
        require_integer("num_classes", self.num_classes, 0)
        for stage, number in enumerate(self.blocks, 1):
            require_integer(f"stage {stage}: the number of blocks", number, 1, _MOST_BLOCKS)
        if len(self.blocks) != 4:
            raise InputError(f"blocks={self.blocks!r} must be four numbers, one for each stage")
        require_choice("block", self.block, BLOCKS)
        require_choice("stem", self.stem, STEMS)
        if self.gating is not None:
            require_choice("gating", self.gating, GATINGS)
        for name, first in (("dilation", 2), ("sc_stages", 1)):
            value, length = getattr(self, name), 5 - first
            if not isinstance(value, tuple) or list(map(type, value)) != [bool] * length:
                raise InputError(
                    f"{name}={value!r} must be {length} booleans, one for each stage from {first} "
                    "to 4"
                )
        if self.block in ("basic", "ghost") and self.reduction is not None:
            raise InputError(f"a {self.block} block has no SlimConv, so it takes no reduction")
        given = ", ".join(f"{name}={value!r}" for name, value in self.unit_settings.items())
        if self.reduction is None and given:
            raise InputError(f"{given} is for SlimConv, and this architecture has none")
        if not any(self.sc_stages):
            raise InputError("sc_stages leaves no stage with SlimConv; take the plain architecture")
        if self.gating is None and "squeeze" in given:
            raise InputError(f"{given}: without a gate there is nothing to squeeze")
        if self.block != "basic" and self.width * self.base_width < 64:
            raise InputError(
                f"width={self.width} with base_width={self.base_width} leaves the bottlenecks no "
                f"channels; width must be at least {math.ceil(64 / self.base_width)}"
            )
        if self.block == "ghost" and (any(self.dilation) or self.groups != 1):
            raise InputError("ghost modules take neither dilation nor groups")
        if self.channels is not None:
            self._check_channels()

    def _check_channels(self) -> None:
        kind = (self.block, self.groups, self.base_width, self.reduction, self.lower_groups)
        if kind != ("bottleneck", 1, 64, None, None):
            raise InputError(
                "channels of each block are for plain bottlenecks, without groups, base_width and "
                "reduction"
            )
        try:
            stem, stages = self.channels
            stages = tuple(tuple(map(tuple, blocks)) for blocks in stages)
        except (TypeError, ValueError):
            raise InputError(
                "channels must be those of the stem and four lists of blocks, each of three numbers"
            ) from None
        object.__setattr__(self, "channels", (stem, stages))
        if tuple(map(len, stages)) != self.blocks:
            raise InputError(f"channels must have blocks={self.blocks} rows, one for each block")
        require_integer("the stem's channels", stem, 1, 2**16)
        for number, blocks in enumerate(stages, 1):
            for row in blocks:
                if len(row) != 3:
                    raise InputError(
                        f"a block of stage {number} has channels {row!r}; it must have three: "
                        "those of the outputs of its three convolutions"
                    )
                for value in row:
                    require_integer(f"stage {number}: a number of channels", value, 1, 2**16)
            if len({row[2] for row in blocks}) > 1:
                raise InputError(
                    f"the blocks of stage {number} must have the same last number of channels, "
                    "since their outputs are added up"
                )

    @property
    def unit_settings(self) -> dict[str, Any]:
        """The settings of SlimConv besides r and groups that are not those of the paper."""
        names = ("squeeze_ratio", "min_squeezed", "gating", "sc_stages")
        values = {name: getattr(self, name) for name in names}
        return {n: value for n, value in values.items() if value != getattr(ResNetConfig, n)}

    @property
    def stem_channels(self) -> int:
        """Channels of the stem's output."""
        return self.width if self.channels is None else self._scaled(self.channels[0])

    def block_channels(self, stage: int, index: int) -> tuple[int, int, int]:
        """Returns the output channels of a block's first and second convolution and of the block.

        A basic block has two convolutions, so the last two numbers are the same. SlimConv has fewer
        output channels than the second convolution that it replaces.
        """
        if self.channels is not None:
            return tuple(map(self._scaled, self.channels[1][stage][index]))
        planes = self.width * 2**stage
        if self.block == "basic":
            return planes, planes, planes
        inner = int(planes * self.base_width / 64) * self.groups
        return inner, inner, 4 * planes

    def _scaled(self, channels: int) -> int:
        """Scales channels from the standard width to this one, to at least 1."""
        return max(channels * self.width // 64, 1)


class SqueezeExcite(nnx.Module):
    """Squeeze-and-excitation (Hu et al., CVPR 2018): one weight in (0, 1) per channel.

    Global average pool, linear layer C -> C // 16, ReLU, linear layer back to C, sigmoid.
    """

    def __init__(self, features: int, *, dtype: Dtype | None, rngs: nnx.Rngs):
        squeezed = max(features // 16, 1)
        common = {"kernel_init": kaiming_normal, "dtype": dtype, "rngs": rngs}
        self.squeeze = nnx.Linear(features, squeezed, **common)
        self.excite = nnx.Linear(squeezed, features, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to weights of shape (N, 1, 1, C)."""
        pooled = x.mean(axis=(1, 2), keepdims=True)
        return nnx.sigmoid(self.excite(nnx.relu(self.squeeze(pooled))))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut, the block of ResNet-18 and -34."""

    def __init__(
        self,
        in_features: int,
        channels: tuple[int, int, int],
        config: ResNetConfig,
        *,
        has_slimconv: bool,
        strides: int,
        dilation: int,
        scale_init: Initializer,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        common = {"dtype": dtype, "rngs": rngs}
        dilated = {"kernel_dilation": dilation, **common}
        inner, _, self.out_features = channels
        self.conv1 = ConvBN(in_features, inner, 3, strides=strides, **dilated)
        self.conv2 = ConvBN(inner, self.out_features, 3, scale_init=scale_init, **dilated)
        self.shortcut = _shortcut(ConvBN, in_features, self.out_features, strides, **common)

    def __call__(self, x: jax.Array, branch_scale: jax.Array | None = None) -> jax.Array:
        """Maps (N, H, W, in_features) to (N, H', W', out_features); see `ResNet` for the scale."""
        y = _scaled(self.conv2(nnx.relu(self.conv1(x))), branch_scale)
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Bottleneck(nnx.Module):
    """1x1 convolution, SlimConv or 3x3 convolution, 1x1 convolution, and a shortcut.

    The middle one has the stride (ResNet v1.5). In a ghost bottleneck all of them are ghost
    modules, including the shortcut's convolution. In an SE bottleneck, squeeze-and-excitation
    weights the output of the last one.
    """

    def __init__(
        self,
        in_features: int,
        channels: tuple[int, int, int],
        config: ResNetConfig,
        *,
        has_slimconv: bool,
        strides: int,
        dilation: int,
        scale_init: Initializer,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        common = {"dtype": dtype, "rngs": rngs}
        middle = common | {"strides": strides}
        if config.block == "ghost":
            conv = GhostConvBN
        else:
            conv = ConvBN
            middle |= {"kernel_dilation": dilation, "feature_group_count": config.groups}
        first, second, self.out_features = channels
        self.conv1 = conv(in_features, first, 1, **common)
        if has_slimconv:
            self.conv2 = SlimConv(
                first,
                reduction=config.reduction,
                lower_feature_group_count=config.lower_groups,
                squeeze_ratio=config.squeeze_ratio,
                min_squeezed=config.min_squeezed,
                gating=config.gating,
                **middle,
            )
        else:
            self.conv2 = conv(first, second, 3, **middle)
        self.conv3 = conv(
            self.conv2.out_features, self.out_features, 1, scale_init=scale_init, **common
        )
        self.se = SqueezeExcite(self.out_features, **common) if config.block == "se" else None
        self.shortcut = _shortcut(conv, in_features, self.out_features, strides, **common)

    def __call__(self, x: jax.Array, branch_scale: jax.Array | None = None) -> jax.Array:
        """Maps (N, H, W, in_features) to (N, H', W', out_features); see `ResNet` for the scale."""
        with jax.named_scope("conv1"):
            y = nnx.relu(self.conv1(x))
        with jax.named_scope("conv2"):
            y = nnx.relu(self.conv2(y))
        with jax.named_scope("conv3"):
            y = self.conv3(y)
        if self.se is not None:
            with jax.named_scope("se"):
                y = y * self.se(y)
        y = _scaled(y, branch_scale)
        with jax.named_scope("shortcut"):
            x = x if self.shortcut is None else self.shortcut(x)
        return nnx.relu(y + x)


def _scaled(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Multiplies each image's values, (N, ...), by its number in (N,), or leaves them."""
    return x if scale is None else x * scale.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


BLOCKS = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
    "ghost": Bottleneck,
    "se": Bottleneck,
}


def _shortcut(
    conv: type[ConvBN | GhostConvBN], in_features: int, out_features: int, strides: int, **options
) -> ConvBN | GhostConvBN | None:
    """Builds a 1x1 convolution where the block changes the shape, None (identity) elsewhere."""
    if strides == 1 and in_features == out_features:
        return None
    return conv(in_features, out_features, 1, strides=strides, **options)


def as_dtype(dtype: Dtype | None) -> jnp.dtype | None:
    """Returns a dtype in canonical form, or None for None.

    Raises:
      ValueError: if it is not a floating-point dtype.
    """
    if dtype is None:
        return None
    with contextlib.suppress(TypeError):
        if jnp.issubdtype(known := jnp.dtype(dtype), jnp.floating):
            return known
    raise InputError(f"dtype={dtype!r} is not a dtype of the computation, such as 'bfloat16'")


class ResNet(nnx.Module):
    """A ResNet or Sc-ResNet classifier; `create_model` builds the named ones.

    Args:
      config: the architecture.
      zero_init_residual: whether the last batch norm of each residual branch starts with
        scale 0, so that every block starts as its shortcut.
      remat: whether training keeps only the output of each block and recomputes the rest in the
        backward pass, which takes less memory and more time.
      dtype: dtype of the computation (bfloat16 on accelerators); inferred from input and
        parameters if None. Parameters, batch statistics and the classifier's arithmetic are
        float32.
      rngs: source of the initial parameters.

    Attributes:
      config: the architecture.

    Raises:
      ValueError: if a SlimConv of the architecture cannot exist (see `SlimConv`), or if
        `dtype` is not a dtype.
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
        features = config.stem_channels
        kernel_size, strides = (7, 2) if config.stem == "imagenet" else (3, 1)
        self.stem = ConvBN(3, features, kernel_size, strides=strides, dtype=dtype, rngs=rngs)

        scale_init = jax.nn.initializers.zeros if zero_init_residual else jax.nn.initializers.ones
        dilation = 1
        self.stages = nnx.List()
        for stage, num_blocks in enumerate(config.blocks):
            strides = 1 if stage == 0 else 2
            # As in torchvision, the block in which dilation replaces the stride still
            # has the dilation of the stage before.
            first_dilation = dilation
            if stage > 0 and config.dilation[stage - 1]:
                dilation, strides = dilation * strides, 1
            blocks = nnx.List()
            for index in range(num_blocks):
                block = BLOCKS[config.block](
                    features,
                    config.block_channels(stage, index),
                    config,
                    has_slimconv=config.reduction is not None and config.sc_stages[stage],
                    strides=strides if index == 0 else 1,
                    dilation=first_dilation if index == 0 else dilation,
                    scale_init=scale_init,
                    dtype=dtype,
                    rngs=rngs,
                )
                blocks.append(block)
                features = block.out_features
            self.stages.append(blocks)

        self.classifier = nnx.data(None)
        if config.num_classes:
            init = uniform_fan_in(features)
            self.classifier = nnx.Linear(
                features, config.num_classes, kernel_init=init, bias_init=init, rngs=rngs
            )

    def features(self, x: jax.Array, branch_scales: jax.Array | None = None) -> list[jax.Array]:
        """Returns the output of each stage for images (N, H, W, 3), float and normalised.

        The four maps (N, H', W', C') have strides 4, 8, 16 and 32 with the "imagenet" stem, and
        1, 2, 4 and 8 with the "cifar" stem; a dilated stage keeps the stride before it.

        Args:
          x: the images.
          branch_scales: numbers (N, blocks) by which each image's residual branches are multiplied,
            for training with stochastic depth; None for 1.

        Raises:
          ValueError: if the images have another shape, or are not floats.
        """
        if x.ndim != 4 or x.shape[-1] != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(
                f"images must be (N, H, W, 3), normalised floats, not {x.dtype} of shape {x.shape}"
            )
        return self.stage_outputs(self.stem_output(x), branch_scales)

    @jax.named_scope("stem")
    def stem_output(self, x: jax.Array) -> jax.Array:
        """Maps images (N, H, W, 3) to the pooled output (N, H', W', width) of the stem."""
        x = nnx.relu(self.stem(x))
        return max_pool(x) if self.config.stem == "imagenet" else x

    def stage_outputs(
        self, x: jax.Array, branch_scales: jax.Array | None = None
    ) -> list[jax.Array]:
        """Maps the pooled output (N, H, W, width) of the stem to the output of each stage."""
        maps, number = [], 0
        for blocks in self.stages:
            for block in blocks:
                inputs = (x,) if branch_scales is None else (x, branch_scales[:, number])
                x = (
                    nnx.remat(type(block).__call__)(block, *inputs)
                    if self.remat
                    else block(*inputs)
                )
                number += 1
            maps.append(x)
        return maps

    def __call__(
        self,
        x: jax.Array,
        *,
        branch_scales: jax.Array | None = None,
        feature_scales: jax.Array | None = None,
    ) -> jax.Array:
        """Maps images (N, H, W, 3), float and normalised, to logits (N, num_classes).

        Without classes, to pooled features (N, C). The output is at least float32, whatever the
        `dtype` of the computation. Errors are those of `features`.

        Args:
          x: the images.
          branch_scales: see `features`.
          feature_scales: numbers (N, C) by which the pooled features are multiplied, for training
            with dropout; None for 1.
        """
        return self.head(self.features(x, branch_scales)[-1], feature_scales)

    @jax.named_scope("head")
    def head(self, x: jax.Array, feature_scales: jax.Array | None = None) -> jax.Array:
        """Maps the last feature map (N, H', W', C') to logits (N, num_classes), or pools it."""
        x = x.astype(at_least_float32(x.dtype)).mean(axis=(1, 2))
        if feature_scales is not None:
            x = x * feature_scales.astype(x.dtype)
        return x if self.classifier is None else self.classifier(x)
