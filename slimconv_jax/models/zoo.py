"""The named architectures, as rows of data, and functions that build and name models."""

import contextlib
import dataclasses
import difflib
import fnmatch
import functools
import os
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.typing import Dtype

from slimconv_jax.errors import InputError
from slimconv_jax.models.channels import read_channels
from slimconv_jax.models.resnet import ResNet, ResNetConfig, as_dtype
from slimconv_jax.models.slimconv import CompressionRatio, k_from_reduction, reduction_from_k
from slimconv_jax.models.variables import by_name

_PLAIN = {
    "resnet14": ResNetConfig((1, 1, 1, 1)),
    "resnet26": ResNetConfig((2, 2, 2, 2)),
    "resnet50": ResNetConfig((3, 4, 6, 3)),
    "resnet101": ResNetConfig((3, 4, 23, 3)),
    "resnet152": ResNetConfig((3, 8, 36, 3)),
    "resnext50_32x4d": ResNetConfig((3, 4, 6, 3), groups=32, base_width=4),
    "resnext101_32x8d": ResNetConfig((3, 4, 23, 3), groups=32, base_width=8),
    "wide_resnet50_2": ResNetConfig((3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": ResNetConfig((3, 4, 23, 3), base_width=128),
}
"""The plain bottleneck networks, each of which has an Sc counterpart at k = 4/3."""

ARCHITECTURES: dict[str, ResNetConfig] = {
    "resnet18": ResNetConfig((2, 2, 2, 2), block="basic"),
    "resnet34": ResNetConfig((3, 4, 6, 3), block="basic"),
    **_PLAIN,
    **{f"sc_{name}": dataclasses.replace(plain, reduction=2) for name, plain in _PLAIN.items()},
    "sc_resnext101_32x3d": ResNetConfig(
        (4, 8, 18, 3), groups=32, base_width=3, reduction=3, lower_groups=16
    ),
    "ghost_resnet50": ResNetConfig((3, 4, 6, 3), block="ghost"),
    "se_resnet50": ResNetConfig((3, 4, 6, 3), block="se"),
}

_FREE = (
    *("reduction", "squeeze_ratio", "min_squeezed", "gating", "sc_stages"),
    *("num_classes", "width", "stem", "dilation"),
)
"""The fields of an architecture that its name leaves open."""


def list_models(pattern: str = "*") -> list[str]:
    """Lists the names that `create_model` knows and that match a shell-style pattern."""
    return [name for name in ARCHITECTURES if fnmatch.fnmatch(name, pattern)]


def create_model(
    name: str | os.PathLike,
    rngs: nnx.Rngs,
    num_classes: int = 1000,
    *,
    k: CompressionRatio | None = None,
    squeeze_ratio: int = 32,
    min_squeezed: int = 1,
    gating: str | None = "flipped",
    sc_stages: Sequence[bool] = (True, True, True, True),
    stem: str = "imagenet",
    width: int = 64,
    dilation: Sequence[bool] = (False, False, False),
    zero_init_residual: bool = False,
    remat: bool = False,
    dtype: Dtype | None = None,
) -> ResNet:
    """Builds a model of a named architecture, in training mode; `model.eval()` switches it.

    Args:
      name: one of `list_models()`, or a JSON file of channels (`slimconv_jax.models.channels`).
      rngs: source of the initial parameters, such as `nnx.Rngs(0)`.
      num_classes: outputs of the classifier; 0 for none, which leaves the pooled features.
      k: compression ratio of every SlimConv, 2r/3 for an integer r >= 2, as a string
        ("8/3"), Fraction or number; None for the architecture's own. Sc models only.
      squeeze_ratio: channels per squeezed channel in the gate of every SlimConv; Sc models only,
        like the next three.
      min_squeezed: minimum number of squeezed channels.
      gating: "flipped" as in the paper; for ablations "plain", the same gate on both paths,
        "upper", no gate on the lower one, or None, without gates.
      sc_stages: for each of the four stages, whether it has SlimConv.
      stem: "imagenet", or "cifar" for small images.
      width: channels of the stem and planes of the first stage, 64 in all published models; the
        channels of a JSON file are those at 64.
      dilation: for each of stages 2, 3 and 4, whether dilation replaces its stride.
      zero_init_residual: whether the last batch norm of each residual branch starts with
        scale 0.
      remat: whether training recomputes the inside of the blocks to save memory.
      dtype: dtype of the computation; parameters, batch statistics and logits are float32.

    Raises:
      ValueError: if the name is unknown, a value is not allowed, or the channels of the
        architecture do not divide by its groups at this k and width.
    """
    config = resnet_config(
        name,
        k=k,
        squeeze_ratio=squeeze_ratio,
        min_squeezed=min_squeezed,
        gating=gating,
        sc_stages=sc_stages,
        num_classes=num_classes,
        stem=stem,
        width=width,
        dilation=dilation,
    )
    options = {"zero_init_residual": zero_init_residual, "remat": remat, "dtype": dtype}
    with _naming(name, config.reduction):
        return ResNet(config, **options, rngs=rngs)


def is_channels_file(name: str | os.PathLike) -> bool:
    """Returns whether an architecture is given by a JSON file of channels, not by name."""
    return isinstance(name, str | os.PathLike) and os.fspath(name).endswith(".json")


def parse_model(text: str) -> tuple[str, str | None]:
    """Splits a model that is written NAME, NAME@K, or FILE.json into name and k."""
    if is_channels_file(text):
        return text, None
    name, _, k = text.partition("@")
    return name, k or None


def normalize_model(text: str) -> str:
    """Writes Sc models as NAME@K, with k as in the paper; returns other names as they are.

    Raises:
      ValueError: if there is no such model.
    """
    name, k = parse_model(text)
    reduction = resnet_config(name, k=k).reduction
    return name if reduction is None else f"{name}@{k_from_reduction(reduction)}"


def named_config(name: str | os.PathLike) -> ResNetConfig:
    """Returns the architecture of a name or JSON file.

    Raises:
      ValueError: if there is no such architecture.
    """
    if is_channels_file(name):
        return read_channels(name)
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(str(name), ARCHITECTURES, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "list_models() names them all"
        raise InputError(f"unknown model {name!r}; {hint}")
    return ARCHITECTURES[name]


def resnet_config(
    name: str | os.PathLike, *, k: CompressionRatio | None = None, **changes: Any
) -> ResNetConfig:
    """Returns a named architecture with changes; see `create_model` for arguments and errors."""
    config = named_config(name)
    if k is not None and config.reduction is None:
        raise InputError(f"{name} has no SlimConv, so it takes no k (k={k!r} was given)")
    reduction = config.reduction if k is None else reduction_from_k(k)
    for key in {"dilation", "sc_stages"} & changes.keys():
        if isinstance(changes[key], Sequence):
            changes[key] = tuple(changes[key])
    with _naming(name, reduction):
        return dataclasses.replace(config, reduction=reduction, **changes)


@contextlib.contextmanager
def _naming(name: str | os.PathLike, reduction: int | None) -> Iterator[None]:
    """Prefixes the message of an InputError with the model that it is about."""
    try:
        yield
    except InputError as error:
        at = f" at k={k_from_reduction(reduction)}" if reduction else ""
        raise InputError(f"{name}{at}: {error}") from None


def abstract_model(name: str | os.PathLike, **overrides) -> ResNet:
    """Builds a model with shapes and dtypes instead of arrays, in about half a second.

    Use it for counting. Arguments and errors are those of `create_model`, without `rngs`.
    """
    return abstract(functools.partial(create_model, name, **overrides))


def abstract_resnet(
    config: ResNetConfig, *, remat: bool = False, dtype: Dtype | None = None
) -> ResNet:
    """Builds `ResNet(config)` without arrays, as the target of loaded weights."""
    return nnx.merge(*_abstract_parts(config, remat, as_dtype(dtype)))


@functools.lru_cache(maxsize=8)
def _abstract_parts(config: ResNetConfig, remat: bool, dtype: jnp.dtype | None) -> tuple:
    build = functools.partial(ResNet, config, remat=remat, dtype=dtype)
    graphdef, state = nnx.split(abstract(build))
    return graphdef, nnx.to_pure_dict(state)


def abstract(build: Callable[..., nnx.Module]) -> nnx.Module:
    """Calls `build(rngs=...)` with shapes and dtypes instead of arrays."""
    # One key for everything, since nothing is drawn. `nnx.Rngs` would count its keys inside
    # the traced program, with jax 0.10 at a cost quadratic in the depth (see BatchNorm).
    rngs = types.SimpleNamespace(params=lambda: jax.random.key(0))
    return nnx.eval_shape(lambda: build(rngs=rngs))


def require_module(model: object, caller: str) -> None:
    """Checks that a model is an NNX module.

    Raises:
      ValueError: if it is not.
    """
    if not isinstance(model, nnx.Module):
        linen = "Linen " if isinstance(model, nn.Module) else ""
        raise InputError(f"{caller} takes an NNX module, not a {linen}{type(model).__name__}")


def require_resnet(model: object, caller: str) -> None:
    """Checks that a model is a ResNet with exactly the parameters of its `config`.

    Raises:
      ValueError: if it is not a ResNet, or was changed: batch norm folded, or SlimConv in a part.
    """
    if not isinstance(model, ResNet):
        raise InputError(f"{caller} takes a slimconv_jax ResNet, not a {type(model).__name__}")
    ours, expected = (
        {name: variable.shape for name, variable in by_name(m).items()}
        for m in (model, abstract_resnet(model.config))
    )
    if ours != expected:
        raise InputError(
            f"{caller} takes a ResNet with the parameters of its architecture, "
            f"{describe(model.config)}; this one was changed (batch norm folded, or SlimConv "
            "in some of its blocks)"
        )


def name_of(config: ResNetConfig) -> str | None:
    """Returns the name of an architecture, whatever its k, classes, stem, width and dilation.

    Returns None if `list_models()` does not have the architecture.
    """

    def fixed(config: ResNetConfig) -> dict:
        kept = {k: v for k, v in vars(config).items() if k not in _FREE}
        return kept | {"is_sc": config.reduction is not None}

    return next((name for name, row in ARCHITECTURES.items() if fixed(row) == fixed(config)), None)


def nearest_name(config: ResNetConfig) -> str:
    """Returns the name of the architecture of the same kind with the nearest block counts."""

    def distance(name: str) -> tuple:
        named = ARCHITECTURES[name]
        return (
            (config.reduction is None) != (named.reduction is None),
            config.block != named.block,
            (config.groups, config.base_width) != (named.groups, named.base_width),
            sum(abs(a - b) for a, b in zip(config.blocks, named.blocks, strict=True)),
        )

    return min(ARCHITECTURES, key=distance)


def describe(config: ResNetConfig) -> str:
    """Describes an architecture in a few words, such as "sc_resnet50, k=4/3, 1000 classes"."""
    kind = "of no known name" if config.channels is None else "of irregular widths"
    words = [name_of(config) or f"{config.block} blocks {config.blocks}, {kind}"]
    if config.reduction is not None:
        words.append(f"k={k_from_reduction(config.reduction)}")
        words += (f"{name} {value}" for name, value in config.unit_settings.items())
    words.append(f"{config.num_classes} classes" if config.num_classes else "no classifier")
    if config.stem != "imagenet":
        words.append(f"{config.stem} stem")
    if config.width != 64:
        words.append(f"width {config.width}")
    if any(config.dilation):
        words.append(f"dilation {config.dilation}")
    return ", ".join(words)
