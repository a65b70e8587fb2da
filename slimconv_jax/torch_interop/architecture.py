"""The architecture behind a state dict, read off the shapes of its entries.

Names are the released ones. Every block votes, so that one damaged or missing entry does not turn
the network into another one, but is reported.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from slimconv_jax.errors import InputError
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.models.slimconv import CompressionRatio, k_from_reduction, reduction_from_k

_BLOCK = re.compile(r"layer([1-4])\.(\d{1,3})\.(.+)")
_PRIMARY = ".primary_conv.0"
_LEAST_NAMES = 3
"""Entries that make a block: fewer are a typing error, as is a number far beyond the others."""


def read_architecture(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    k: CompressionRatio | None = None,
    gating: str | None = None,
) -> ResNetConfig:
    """Reads the architecture of a state dict off the shapes of its entries.

    Shapes do not show strides and dilation: those of the published networks are assumed
    (ResNet v1.5, no dilation).

    Args:
      shapes: the shape of each entry, by released name, without prefix.
      k: the compression ratio, needed only in very narrow networks, where several
        fit the shapes.
      gating: of the SlimConvs that have a gate; None for "flipped", as published. Shapes do not
        show what a gate does.

    Raises:
      ValueError: if these are not entries of a ResNet, or have another k, or there is no such
        gating.
    """
    blocks: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault((int(match[1]) - 1, int(match[2])), {})[match[3]] = shape
    blocks = {place: block for place, block in blocks.items() if len(block) >= _LEAST_NAMES}
    counts = Counter(stage for stage, _ in blocks)
    blocks = {(s, index): b for (s, index), b in blocks.items() if index < 2 * counts[s]}
    depths = [max((i + 1 for s, i in blocks if s == stage), default=0) for stage in range(4)]
    if 0 in depths:
        some = ", ".join(map(repr, list(shapes)[:3])) or "none"
        raise InputError(
            "these are not the entries of a ResNet with four stages: nothing (or next to nothing) "
            f"is named layer{depths.index(0) + 1}.0.conv1.weight and so on; the first names are "
            f"{some}"
        )

    ghost = any(_PRIMARY in name for block in blocks.values() for name in block)
    has_se = _most_voted("se.fc1.weight" in block for block in blocks.values())
    for block in blocks.values():  # as if ghost modules were convolutions
        block |= {
            name.replace(_PRIMARY, ""): (2 * shape[0], *shape[1:])
            for name, shape in block.items()
            if shape and _PRIMARY in name
        }
    basic = not any("conv3.weight" in block for block in blocks.values())
    outputs = "conv2.weight" if basic else "conv3.weight"
    width = _most_voted(
        shape[0] // ((1 if basic else 4) * 2**stage)
        for (stage, _), block in blocks.items()
        if (shape := _conv(block, outputs))
    )
    if not width:
        raise InputError(f"no block has a convolution {outputs}, as the blocks of a ResNet have")
    settings = {
        "blocks": tuple(depths),
        "block": "ghost" if ghost else "basic" if basic else "se" if has_se else "bottleneck",
        "width": width,
        **read_ends(shapes),
    }
    if not basic:
        settings |= _bottleneck_settings(blocks, width, k)
    if "reduction" not in settings:
        for name, value in (("k", k), ("gating", gating)):
            if value is not None:
                raise InputError(f"{name}={value} was asked for, and the entries have no SlimConv")
    else:
        settings |= _gate_settings(blocks, gating)
    try:
        return ResNetConfig(**settings)
    except InputError as error:
        raise InputError(f"no ResNet has these shapes: {error}") from None


def read_ends(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Reads the number of classes and the stem off shapes, as settings of a config."""
    stem = _conv(shapes, "conv1.weight")
    classifier = shapes.get("fc.weight") or shapes.get("fc.bias")
    return {
        "num_classes": classifier[0] if classifier else 0,
        "stem": "cifar" if stem and stem[2:] == (3, 3) else "imagenet",
    }


def _bottleneck_settings(blocks: Mapping, width: int, k: CompressionRatio | None) -> dict:
    """Reads groups, base width and reduction off the shapes of each bottleneck's convolutions."""
    groups, lower_groups, reductions, inner = [], [], [], []
    for (stage, _), block in blocks.items():
        conv1 = _conv(block, "conv1.weight")
        plain = _conv(block, "conv2.weight")
        upper = _conv(block, "conv2.conv2_1.0.weight")
        lower = _conv(block, "conv2.conv2_2.3.weight")
        if conv1:
            inner.append((width * 2**stage, conv1[0]))
        if upper or plain:
            groups.append(_groups(upper or plain))
        if lower:
            lower_groups.append(_groups(lower))
        if conv1 and upper and lower:
            reductions += [
                r
                for r in range(2, conv1[0] // 2 + 1)
                if conv1[0] // r == upper[0] and conv1[0] // (2 * r) == lower[0]
            ]
    if not groups:
        raise InputError(
            "no block has a 3x3 convolution conv2.weight, nor conv2.conv2_1.0.weight of a SlimConv"
        )
    settings = {"groups": _most_voted(groups)}
    settings["base_width"] = _most_voted(
        base_width
        for planes, features in inner
        for base_width in _base_widths(planes, features // settings["groups"])
    )
    if not lower_groups:
        return settings
    votes = Counter(reductions)
    possible = sorted(r for r in votes if votes[r] == max(votes.values()))
    if not possible:
        raise InputError("the shapes of the SlimConvs fit no compression ratio k")
    ratios = " and ".join(str(k_from_reduction(r)) for r in possible)
    if k is None and len(possible) > 1:
        raise InputError(f"the network is so narrow that k={ratios} fit its shapes; say which k")
    reduction = possible[0] if k is None else reduction_from_k(k)
    if reduction not in possible:
        raise InputError(f"k={k} was asked for, and the entries have k={ratios}")
    settings["reduction"] = reduction
    if (of_lower := _most_voted(lower_groups)) != settings["groups"]:
        settings["lower_groups"] = of_lower
    return settings


def _gate_settings(blocks: Mapping, gating: str | None) -> dict:
    """Reads where SlimConv is, and the width of its gates, off the shapes of its convolutions."""
    votes = [[] for _ in range(4)]
    for (stage, _), block in blocks.items():
        votes[stage].append(any(name.startswith("conv2.conv2_") for name in block))
    # Where half of the blocks have lost theirs, the report says so.
    settings = {"sc_stages": tuple(2 * sum(stage) >= len(stage) for stage in votes)}
    gates = (_conv(block, "conv2.fc.0.weight") for block in blocks.values())
    votes = Counter((gate[1], gate[0]) for gate in gates if gate)
    squeezed = dict(votes.most_common(8))  # a network has four; a damaged file may have hundreds
    has_gate = any(name.startswith("conv2.fc.") for block in blocks.values() for name in block)
    settings["gating"] = gating or ("flipped" if has_gate else None)
    if not squeezed:
        return settings

    def fitting(ratio: int, least: int) -> int:
        return sum(n for (c, s), n in squeezed.items() if max(c // ratio, least) == s)

    # Several may fit, and compute the same: the published ratio comes first, then the largest.
    ratios = 32, *range(min(max(c for c, _ in squeezed), 2**12), 0, -1)
    candidates = itertools.product(ratios, sorted({1, *(s for _, s in squeezed)}))
    ratio, least = max(candidates, key=lambda candidate: fitting(*candidate))
    return settings | {"squeeze_ratio": ratio, "min_squeezed": least}


def _conv(block: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...] | None:
    """Returns the shape (O, I, H, W) of a convolution, None if there is no such entry."""
    shape = block.get(name, ())
    return shape if len(shape) == 4 and 0 not in shape else None


def _groups(shape: tuple[int, ...]) -> int:
    """Returns the groups of a convolution with as many outputs as inputs."""
    return max(shape[0] // shape[1], 1)


def _base_widths(planes: int, features: int) -> list[int]:
    """Returns every base width for which a group of a bottleneck has that many features."""
    nearest = features * 64 // planes
    around = range(max(nearest, 1), nearest + 64 // planes + 2)
    return [b for b in around if int(planes * b / 64) == features]


def _most_voted(votes: Iterable[int]) -> int:
    """Returns the most frequent number, the smallest in a tie; 0 if there are no votes."""
    counts = Counter(votes)
    return min(counts, key=lambda vote: (-counts[vote], vote), default=0)
