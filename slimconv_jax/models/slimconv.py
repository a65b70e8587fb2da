"""The SlimConv unit: reconstruct, transform, fuse (Qiu et al., IEEE TIP 2021, section III).

The unit gates its channels, folds them together twice, once with the gate reversed, and
convolves the two folded halves. It replaces a 3x3 convolution and returns fewer channels than it
gets.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike

from slimconv_jax.errors import InputError, require_choice, require_integer
from slimconv_jax.models.layers import (
    BatchNorm,
    ConvBN,
    kaiming_normal,
    mergeable,
    normalize,
    uniform_fan_in,
)
from slimconv_jax.models.mode import running_average

CompressionRatio = str | Fraction | float

GATINGS = ("flipped", "plain", "upper")
"""What is gated: both paths, the lower one by the reversed gate; both by the same; or one."""


def reduction_from_k(k: CompressionRatio) -> int:
    """Returns the reduction r >= 2 of the upper path for a compression ratio k = 2r/3.

    Args:
      k: a string such as "8/3", a Fraction, or a number.

    Raises:
      ValueError: if k is not 2r/3 for an integer r >= 2.
    """
    try:
        if not isinstance(k, str | Real) or isinstance(k, bool):
            raise TypeError
        r = Fraction(k if isinstance(k, str) else float(k)) * 3 / 2
        reduction = round(r)
        # The tolerance is for floats: 8 / 3 is not quite eight thirds.
        if reduction < 2 or abs(r - reduction) > 1e-6:
            raise ValueError
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        ratios = ", ".join(str(k_from_reduction(r)) for r in range(2, 9))
        raise InputError(
            f"k={k!r} is not a compression ratio of SlimConv: it must be 2r/3 for an "
            f"integer r >= 2, that is one of {ratios}, ..."
        ) from None
    return reduction


def k_from_reduction(reduction: int) -> Fraction:
    """Returns the compression ratio k = C_in / C_out = 2r/3, the paper's name for a setting."""
    return Fraction(2 * reduction, 3)


def _obstacle(in_features: int, reduction: int, upper_groups: int, lower_groups: int) -> str | None:
    """Says why a SlimConv of these settings cannot exist; returns None if it can."""
    if in_features < 2 * reduction:
        return f"needs at least {2 * reduction} input channels and got {in_features}"
    for path, features, groups in (
        ("upper", in_features // reduction, upper_groups),
        ("lower", in_features // (2 * reduction), lower_groups),
    ):
        if features % groups:
            return f"has {features} channels in its {path} path, not divisible by {groups} groups"
    return None


class Gate(nnx.Module):
    """One weight in (0, 1) per channel, from the channels' global averages.

    Global average pool, 1x1 convolution C -> max(C // squeeze_ratio, min_squeezed) without bias,
    batch norm, ReLU, 1x1 convolution back to C with bias, sigmoid. On a 1x1 map a
    1x1 convolution is a matrix product, hence `nnx.Linear`.

    Args:
      features: channels C.
      squeeze_ratio: channels per squeezed channel.
      min_squeezed: minimum number of squeezed channels.
      precision: of the products (see `nnx.Linear`).
      dtype: dtype of the computation; inferred from input and parameters if None.
      param_dtype: dtype of the parameters.
      rngs: source of the initial parameters.
      **norm: momentum, epsilon, axis_name and axis_index_groups of the `BatchNorm`.
    """

    def __init__(
        self,
        features: int,
        *,
        squeeze_ratio: int = 32,
        min_squeezed: int = 1,
        precision: PrecisionLike = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **norm,
    ):
        squeezed = max(features // squeeze_ratio, min_squeezed)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = {"kernel_init": kaiming_normal, "precision": precision, **common}
        self.squeeze = nnx.Linear(features, squeezed, use_bias=False, **linear)
        self.bn = BatchNorm(squeezed, **norm, **common)
        self.excite = nnx.Linear(squeezed, features, bias_init=uniform_fan_in(squeezed), **linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., H, W, C) to weights of shape (..., 1, 1, C)."""
        pooled = x.mean(axis=(-3, -2), keepdims=True)
        return nnx.sigmoid(self.excite(nnx.relu(self.bn(self.squeeze(pooled)))))


class SlimConv(nnx.Module):
    """SlimConv, a drop-in replacement for a 3x3 convolution (paper, section III; figure 2).

    With C input channels, a = C // r and b = C // 2r:

    1. Reconstruct: the gate gives weights w, one per channel; w' is w reversed along the
       channels. The upper features are `w * x`, split into r chunks of a channels, which are
       added up; the lower features are `w' * x`, folded in the same way.
    2. Transform: a 3x3 convolution a -> a on the upper path; a 1x1 convolution a -> b and
       ReLU, then a 3x3 convolution b -> b on the lower one. Batch norm follows each.
    3. Fuse: upper, then lower, concatenated along channels. No activation: apply ReLU next.

    Strides, dilation, padding and groups belong to the two 3x3 convolutions. The gate pools
    the input before any stride.

    Args:
      in_features: channels C of the input, at least 2r. Where r does not divide C, the last
        C mod r channels take part in the gate only.
      k: compression ratio 2r/3 as a string ("8/3"), Fraction or number. Give `k` or
        `reduction`; without either, k is 4/3.
      reduction: r >= 2, the reduction of the upper path; that of the lower one is 2r.
      strides: one stride, or one for each of height and width.
      kernel_dilation: one dilation, or one for each of height and width.
      padding: as in `nnx.Conv`; None is the dilation on each side, as in the paper.
      feature_group_count: groups of the upper 3x3 convolution; must divide a.
      lower_feature_group_count: groups of the lower one; must divide b. The same as
        `feature_group_count` if None.
      squeeze_ratio: the gate squeezes C channels to C // squeeze_ratio.
      min_squeezed: minimum number of channels that it squeezes them to.
      gating: "flipped" as in the paper; for ablations "plain", w on both paths, "upper", w on the
        upper path and nothing on the lower one, or None, without a gate.
      kernel_init: initialiser of the kernels of the three convolutions; those of the gate, which
        are matrices, have their own.
      kernel_metadata: of the kernels of the three convolutions, such as their sharding (see
        `nnx.Conv`).
      momentum: of all batch norms: the share of the running average that each batch keeps.
      epsilon: of all batch norms: added to the variance.
      axis_name: of all batch norms: the name of the axis of devices whose inputs are one batch,
        under `jax.shard_map` and the like.
      axis_index_groups: of all batch norms: groups of those devices.
      precision: of all convolutions and products (see `nnx.Conv`).
      dtype: dtype of the computation; inferred from input and parameters if None.
      param_dtype: dtype of the parameters. Batch statistics are float32.
      rngs: source of the initial parameters.

    Attributes:
      out_features: channels of the output, a + b.
      reduction: r.
      gate: the `Gate`; None without one.

    Raises:
      ValueError: if k is not 2r/3 for an integer r >= 2, or C is too small for r, or the
        channels of a path do not divide by its groups, or there is no such gating.
    """

    def __init__(
        self,
        in_features: int,
        *,
        k: CompressionRatio | None = None,
        reduction: int | None = None,
        strides: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        padding: PaddingLike | None = None,
        feature_group_count: int = 1,
        lower_feature_group_count: int | None = None,
        squeeze_ratio: int = 32,
        min_squeezed: int = 1,
        gating: str | None = "flipped",
        kernel_init: Initializer = kaiming_normal,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        axis_name: str | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        precision: PrecisionLike = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if reduction is None:
            reduction = reduction_from_k("4/3" if k is None else k)
        elif k is not None:
            raise InputError(f"give k or reduction, not both (k={k!r}, reduction={reduction!r})")
        if lower_feature_group_count is None:
            lower_feature_group_count = feature_group_count
        for name, value, least in (
            ("in_features", in_features, 1),
            ("reduction", reduction, 2),
            ("feature_group_count", feature_group_count, 1),
            ("lower_feature_group_count", lower_feature_group_count, 1),
            ("squeeze_ratio", squeeze_ratio, 1),
            ("min_squeezed", min_squeezed, 1),
        ):
            require_integer(f"SlimConv: {name}", value, least)
        if gating is not None:
            require_choice("SlimConv: gating", gating, GATINGS)
        groups = feature_group_count, lower_feature_group_count
        if obstacle := _obstacle(in_features, reduction, *groups):
            possible = [
                str(k_from_reduction(r))
                for r in range(2, max(in_features // 2, 2) + 1)
                if not _obstacle(in_features, r, *groups)
            ]
            if len(possible) > 7:
                possible[7:] = [f"... {possible[-1]}"]
            raise InputError(
                f"SlimConv({in_features}) at k={k_from_reduction(reduction)} {obstacle}; "
                f"k possible with these channels and groups: {', '.join(possible) or 'none'}"
            )

        common = {
            "momentum": momentum,
            "epsilon": epsilon,
            "axis_name": axis_name,
            "axis_index_groups": axis_index_groups,
            "precision": precision,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        conv = {"kernel_init": kernel_init, "kernel_metadata": kernel_metadata, **common}
        conv3x3 = conv | {
            "strides": strides,
            "kernel_dilation": kernel_dilation,
            "padding": padding,
        }
        a, b = in_features // reduction, in_features // (2 * reduction)  # as in the docstring
        squeeze = {"squeeze_ratio": squeeze_ratio, "min_squeezed": min_squeezed}
        self.gate = None if gating is None else Gate(in_features, **squeeze, **common)
        self.upper = ConvBN(a, a, 3, feature_group_count=feature_group_count, **conv3x3)
        self.lower_reduce = ConvBN(a, b, 1, **conv)
        self.lower = ConvBN(b, b, 3, feature_group_count=lower_feature_group_count, **conv3x3)
        self.in_features = in_features
        self.out_features = a + b
        self.reduction = reduction
        self.squeeze_ratio = squeeze_ratio
        self.min_squeezed = min_squeezed
        self.gating = gating

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Maps (..., H, W, in_features) to (..., H', W', out_features).

        Args:
          x: the input.
          use_running_average: whether the batch norms normalise by their running averages;
            overrides `train` and `eval`.
        """
        if use_running_average is None:
            use_running_average = running_average.value
        with running_average(use_running_average):
            return self._transform(*self.reconstruct(x))

    def _transform(self, upper: jax.Array, lower: jax.Array) -> jax.Array:
        """Maps the upper and the lower features to the output of the unit."""
        # In training the batch norms of both paths normalise together, in one pass, so that the
        # modules of the paths are not called themselves.
        paths = [self.upper, self.lower]
        together = all(type(path) is ConvBN for path in paths) and mergeable([p.bn for p in paths])
        with jax.named_scope("upper"):
            upper = self.upper.conv(upper) if together else self.upper(upper)
        with jax.named_scope("lower"):
            lower = nnx.relu(self.lower_reduce(lower))
            lower = self.lower.conv(lower) if together else self.lower(lower)
        if together:
            return normalize([path.bn for path in paths], [upper, lower])
        return jnp.concatenate([upper, lower], axis=-1)

    def reconstruct(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps (..., H, W, in_features) to the upper and the lower features, each (..., H, W, a).

        Raises:
          ValueError: if the input has other channels, or no height and width.
        """
        if x.ndim < 3 or x.shape[-1] != self.in_features:
            raise InputError(
                f"SlimConv({self.in_features}) takes (..., H, W, {self.in_features}), not {x.shape}"
            )
        weights = None
        if self.gate is not None:
            with jax.named_scope("gate"):
                weights = self.gate(x)
        with jax.named_scope("fold"):
            # A sum of parts, because a reshape of the channels would change the layout on
            # accelerators. One split, so that one pass puts the gradients together. In the dtype
            # of the computation, because in float32 the step of a bfloat16 run is 2 % longer.
            chunks = self._split(x)
            if self.gating == "flipped":
                flipped = jnp.flip(weights, axis=-1)
                return self._fold(chunks, weights), self._fold(chunks, flipped)
            upper = self._fold(chunks, weights)
            return upper, self._fold(chunks, None) if self.gating == "upper" else upper

    def _fold(self, chunks: list[jax.Array], weights: jax.Array | None) -> jax.Array:
        """Adds up the chunks of a feature map, gated if there are weights."""
        if weights is not None:
            chunks = map(operator.mul, self._split(weights), chunks)
        return functools.reduce(operator.add, chunks)

    def _split(self, x: jax.Array) -> list[jax.Array]:
        """Splits (..., C) into r chunks of a consecutive channels, each (..., a)."""
        size = self.in_features // self.reduction
        ends = [size * index for index in range(1, self.reduction + 1)]
        return jnp.split(x, ends, axis=-1)[: self.reduction]
