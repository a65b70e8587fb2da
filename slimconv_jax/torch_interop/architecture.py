"""The architecture behind a state dict, read off the shapes of its entries.

Every block votes, so that one damaged or missing entry does not turn the network into
another one: it is then reported as what it is.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from slimconv_jax.errors import InputError
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.models.slimconv import CompressionRatio, k_from_reduction, reduction_from_k

_BLOCK = re.compile(r"layer([1-4])\.(\d{1,3})\.(.+)")
_LEAST_NAMES = 3
"""Entries that make a block: fewer are a slip in a name, as is a number far beyond the others."""


def read_architecture(
    shapes: Mapping[str, tuple[int, ...]], *, k: CompressionRatio | None = None
) -> ResNetConfig:
    """The architecture of a state dict.

    Strides and dilation leave no trace in shapes: they are taken to be those of the published
    networks (ResNet v1.5, no dilation).

    Args:
      shapes: the shape of each entry, by released name, without prefix.
      k: the compression ratio, needed only in very narrow networks, where several
        fit the shapes.

    Raises:
      ValueError: if these are not entries of a ResNet, or k is not the one of the file.
    """
    blocks: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault((int(match[1]) - 1, int(match[2])), {})[match[3]] = shape
    blocks = {place: block for place, block in blocks.items() if len(block) >= _LEAST_NAMES}
    counts = Counter(stage for stage, _ in blocks)
    blocks = {(s, index): b for (s, index), b in blocks.items() if index < 2 * counts[s]}
    missing = [f"layer{s + 1}" for s in range(4) if not any(place[0] == s for place in blocks)]
    if missing:
        some = ", ".join(map(repr, list(shapes)[:3])) or "none"
        raise InputError(
            f"these are not the entries of a ResNet with four stages: nothing (or next to nothing) "
            f"is named {missing[0]}.0.conv1.weight and so on; the first names are {some}"
        )

    ghost = any(_PRIMARY in name for block in blocks.values() for name in block)
    if ghost:  # of a ghost module, as if it were a convolution
        blocks = {place: _without_ghosts(block) for place, block in blocks.items()}
    basic = not any("conv3.weight" in block for block in blocks.values())
    outputs = "conv2.weight" if basic else "conv3.weight"
    width = _most_voted(
        shape[0] // ((1 if basic else 4) * 2**stage)
        for (stage, _), block in blocks.items()
        if (shape := _conv(block, outputs))
    )
    if not width:
        raise InputError(f"no block has a convolution {outputs}, as those of a ResNet have")
    settings = {
        "blocks": tuple(1 + max(index for s, index in blocks if s == stage) for stage in range(4)),
        "block": "ghost" if ghost else "basic" if basic else "bottleneck",
        "width": width,
        **read_ends(shapes),
    }
    if not basic:
        settings |= _bottleneck_settings(blocks, width, k)
    elif k is not None:
        raise InputError(f"k={k} was asked for, and the entries have no SlimConv")
    try:
        return ResNetConfig(**settings)
    except InputError as error:
        raise InputError(f"the shapes are those of no ResNet: {error}") from None


def read_ends(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """The classes and the stem that the shapes of a state dict say, as settings of a config."""
    stem = _conv(shapes, "conv1.weight")
    classifier = shapes.get("fc.weight") or shapes.get("fc.bias")
    return {
        "num_classes": classifier[0] if classifier else 0,
        "stem": "cifar" if stem and stem[2:] == (3, 3) else "imagenet",
    }


_PRIMARY = ".primary_conv.0"


def _without_ghosts(block: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a block's convolutions in place of those of its ghost modules."""
    return {
        name.replace(_PRIMARY, ""): (2 * shape[0], *shape[1:])
        if shape and _PRIMARY in name
        else shape
        for name, shape in block.items()
        if "cheap_operation" not in name
    }


def _bottleneck_settings(blocks: Mapping, width: int, k: CompressionRatio | None) -> dict:
    """Groups, base width and reduction, from the shapes of each bottleneck's convolutions."""
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
        if k is not None:
            raise InputError(f"k={k} was asked for, and the entries have no SlimConv")
        return settings
    votes = Counter(reductions)
    possible = sorted(r for r in votes if votes[r] == max(votes.values()))
    if not possible:
        raise InputError("the shapes of the SlimConvs fit no compression ratio k")
    reduction = possible[0] if k is None and len(possible) == 1 else None
    if k is not None and reduction_from_k(k) in possible:
        reduction = reduction_from_k(k)
    if reduction is None:
        ratios = " and ".join(str(k_from_reduction(r)) for r in possible)
        if k is not None:
            raise InputError(f"k={k} was asked for, and the entries have k={ratios}")
        raise InputError(f"the network is so narrow that k={ratios} fit its shapes; say which k")
    settings["reduction"] = reduction
    if (of_lower := _most_voted(lower_groups)) != settings["groups"]:
        settings["lower_groups"] = of_lower
    return settings


def _conv(block: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...] | None:
    """The shape (O, I, H, W) of a convolution, None if there is no such entry."""
    shape = block.get(name, ())
    return shape if len(shape) == 4 and 0 not in shape else None


def _groups(shape: tuple[int, ...]) -> int:
    """The groups of a convolution with as many outputs as inputs."""
    return max(shape[0] // shape[1], 1)


def _base_widths(planes: int, features: int) -> list[int]:
    """Every base width for which a group of a bottleneck has so many features."""
    nearest = features * 64 // planes
    around = range(max(nearest, 1), nearest + 64 // planes + 2)
    return [b for b in around if int(planes * b / 64) == features]


def _most_voted(votes: Iterable[int]) -> int:
    """The most frequent number, the smallest of them in a tie; 0 if there is none."""
    counts = Counter(votes)
    return min(counts, key=lambda vote: (-counts[vote], vote), default=0)
