"""State dicts to models and back: `from_torch` and `to_torch`."""

import dataclasses
import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from slimconv_jax.errors import InputError, InputWarning
from slimconv_jax.models.resnet import ResNet, as_dtype
from slimconv_jax.models.slimconv import CompressionRatio
from slimconv_jax.models.zoo import (
    ARCHITECTURES,
    abstract_resnet,
    describe,
    is_channels_file,
    name_of,
    named_config,
    require_resnet,
)
from slimconv_jax.torch_interop.architecture import read_architecture, read_ends
from slimconv_jax.torch_interop.file_formats import is_array
from slimconv_jax.torch_interop.names import IN_BLOCK, LEAVES, WRAPPERS, entries, released_name
from slimconv_jax.torch_interop.strangers import looks_like


def from_torch(
    state_dict: Mapping[str, Any],
    *,
    arch: str | os.PathLike | None = None,
    k: CompressionRatio | None = None,
    gating: str | None = None,
    dtype: Dtype | None = None,
) -> ResNet:
    """Builds the model of a PyTorch state dict, in evaluation mode.

    The architecture is read off the shapes: blocks, width, k, groups, stem, classes, and where
    SlimConv is and how wide its gates are; without `fc` the model has no classifier. Shapes do
    not show strides, dilation, anti-aliasing (timm's `aa_layer`) and the like: those of the
    published networks are assumed. A network that was trained with dilation computes the same only
    after `backbone(model, output_stride=...)`.

    Args:
      state_dict: PyTorch tensors or NumPy arrays by name, the released ones or torchvision's,
        with or without a prefix such as `module.`. Entries of half precision become float32.
        Everything but `num_batches_tracked` must be used.
      arch: the name that the architecture must have, one of `list_models()`, at any k, width
        and number of classes; or a JSON file of channels, for networks of irregular widths (at the
        width of the file), which are not read off shapes.
      k: the compression ratio that it must have; needed where the network is so narrow that
        several fit its shapes.
      gating: what its gates do, which shapes do not show: "plain" or "upper" for the networks of
        such ablations, None for the published "flipped"; see `SlimConv`.
      dtype: dtype of the computation, as in `create_model`.

    Warns:
      UserWarning: if weights are infinite or NaN, or variances negative, with the names.

    Raises:
      ValueError: if the entries are not exactly those of one of our architectures; the
        message lists all that are missing, unexpected and of another shape.
    """
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise InputError(f"from_torch takes a state dict, such as net.state_dict(), not a {kind}")
    arrays = clean_state_dict(state_dict)
    if not arrays:
        keys = ", ".join(map(repr, list(state_dict)[:8])) or "nothing"
        raise InputError(
            f"a state dict has tensors by name, and this has {keys}; from a whole checkpoint, pass "
            "the state dict inside, such as checkpoint['state_dict']"
        )
    shapes = {name: array.shape for name, array in arrays.items()}
    if arch is not None and is_channels_file(arch):
        for name, value in (("k", k), ("gating", gating)):
            if value is not None:
                raise InputError(f"{arch} has no SlimConv, so it takes no {name} ({value!r})")
        config = dataclasses.replace(named_config(arch), **read_ends(shapes))
    else:
        try:
            config = read_architecture(shapes, k=k, gating=gating)
        except InputError as error:
            raise InputError(f"{looks_like(shapes)}{error}") from None
        if arch is not None and name_of(config) != arch:
            named_config(arch)  # raises if there is none
            # Where only blocks are missing or too many, the report says which.
            complete = dataclasses.replace(config, blocks=ARCHITECTURES[arch].blocks)
            if name_of(config) is not None or name_of(complete) != arch:
                raise InputError(
                    f"{arch} was asked for, and the entries are those of {describe(config)}"
                )
            config = complete
    dtype = as_dtype(dtype)  # outside of `try`: its error is not about the shapes
    try:
        model = abstract_resnet(config, dtype=dtype)
    except InputError as error:
        raise InputError(f"no ResNet has these shapes: {error}") from None
    table = entries(model)
    expected = {name: entry.shape for name, entry in table.items()}
    if shapes != expected:
        nearest = "" if arch else ", the nearest architecture"
        if not arch and config.block == "bottleneck" and config.reduction is None:
            nearest += " (if its widths are irregular, `arch` must be a JSON file of them)"
        raise InputError(
            f"{looks_like(shapes)}the entries are not those of {describe(config)}{nearest}:\n"
            + "\n".join(_differences(shapes, expected))
        )
    if odd := [*filter(None, map(_oddity, arrays, arrays.values()))]:
        warnings.warn(f"these entries look damaged: {', '.join(odd)}", InputWarning, stacklevel=2)
    for name, entry in table.items():
        entry.variable.set_value(jnp.array(entry.to_ours(arrays[name])))
    model.eval()
    return model


def to_torch(model: ResNet) -> dict[str, np.ndarray]:
    """Returns the PyTorch state dict of a model: NumPy arrays by released name, in its layout.

    `num_batches_tracked` is left out: inference does not use it, and PyTorch loads state dicts
    without it even in strict mode.

    Raises:
      ValueError: if the model is not a ResNet of this package, or was changed
        (`fold_batch_norm`).
    """
    require_resnet(model, "to_torch")
    return {name: entry.to_torch() for name, entry in entries(model).items()}


def rename(
    state_dict: Mapping[str, Any], substitutions: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    """Returns the state dict under other names.

    Args:
      state_dict: anything by name.
      substitutions: regular expressions and their replacements, applied in order to every name,
        prefixes included, as `re.sub` does. An entry whose name becomes empty is left out.

    Raises:
      ValueError: if a regular expression is invalid or matches no name, or two entries get
        the same name.
    """
    names = {name: name for name in _names(state_dict)}
    for pattern, replacement in substitutions:
        try:
            if not any(re.search(pattern, name) for name in names.values()):
                raise InputError(f"rename {pattern!r}: this matches no name")
            names = {old: re.sub(pattern, replacement, new) for old, new in names.items()}
        except (re.error, IndexError) as error:
            raise InputError(f"rename {pattern!r} to {replacement!r}: {error}") from None
    renamed = {}
    for old, value in state_dict.items():
        new = names.get(old, old)
        if new in renamed:
            raise InputError(f"two entries are named {new!r} after renaming; one was {old!r}")
        if new != "":
            renamed[new] = value
    return renamed


_LONGEST_NAME = 1000
"""The characters of the longest name; PyTorch's have a few dozen."""


def _names(state_dict: Mapping[str, Any]) -> list[str]:
    """Returns the keys of a state dict that are strings.

    Raises:
      ValueError: if one is so long that matching patterns with it could take hours.
    """
    names = [name for name in state_dict if isinstance(name, str)]
    for name in names:
        if len(name) > _LONGEST_NAME:
            raise InputError(
                f"the name of an entry, {name[:60]!r} ..., has {len(name):,} characters; at most "
                f"{_LONGEST_NAME} are allowed"
            )
    return names


def clean_state_dict(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters and statistics of a state dict, in float32 or float64.

    Their names lose wrappers and the prefix, and become the released ones (see `CONVENTIONS`).

    Raises:
      ValueError: if one of them is not a dense floating-point tensor, or the names are
        those of several networks.
    """
    arrays = {}
    for full_name in _names(state_dict):
        value, name = state_dict[full_name], WRAPPERS.sub("", full_name)
        leaf = name.rpartition(".")[2]
        if leaf == "num_batches_tracked":
            continue
        if leaf not in LEAVES.values() and not (is_array(value) and (value.ndim or "." in name)):
            continue  # what else a file holds beside its tensors, such as a best accuracy
        array = _as_array(value)
        if isinstance(array, str):
            raise InputError(f"{full_name} is {array}; a dense floating-point tensor is needed")
        if name in arrays:
            raise InputError(f"{name} appears twice, with and without the name of a wrapper")
        if array.size:  # a classifier of no classes has none
            arrays[name] = array
    networks: dict[str, set[str]] = {}
    for name in arrays:
        if match := IN_BLOCK.fullmatch(name):
            networks.setdefault(match[1], set()).add(match[2])
    prefix = max(networks, key=lambda prefix: len(networks[prefix]), default="")
    for other, names in networks.items():
        if other != prefix and names & networks[prefix]:
            raise InputError(
                f"there are several networks, under the prefixes {prefix!r} and {other!r}; leave "
                "one of them out, which renaming its entries to nothing does"
            )
    clean = {}
    for name, array in arrays.items():
        stripped = released_name(name.removeprefix(prefix))
        if stripped in clean:
            raise InputError(f"{stripped} appears twice, with and without the prefix {prefix!r}")
        clean[stripped] = array
    return clean


def _as_array(value: Any) -> np.ndarray | str:
    """Converts a tensor or array to float32, or keeps float64 where JAX has that switched on.

    Returns:
      The array; or a string that says what the value is, if not a dense floating-point tensor.
    """
    keep = jax.config.jax_enable_x64
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if torch.nn.parameter.is_lazy(value):
            return "a tensor without values yet, of a lazy module"
        # A file may have set attributes of a tensor that hide its methods: `detach` drops them.
        value = torch.Tensor.detach(value)
        for what, is_so in (
            ("that is quantised", value.is_quantized),
            ("that is nested", value.is_nested),
            ("that is sparse", value.layout != torch.strided),
            ("without values, on the meta device", value.device.type == "meta"),
            (f"of type {value.dtype}", not value.is_floating_point()),
        ):
            if is_so:
                return f"a tensor {what}"
        wide = torch.float64 if keep and value.dtype == torch.float64 else torch.float32
        try:
            return value.resolve_neg().to("cpu", wide).numpy()
        except (RuntimeError, TypeError):  # of subclasses with a mind of their own
            return f"a {type(value).__name__}, a tensor whose values cannot be read"
    if not is_array(value):
        return f"a {type(value).__name__}"
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"an array of type {value.dtype}"
    with np.errstate(over="ignore"):  # what becomes infinite is reported by name
        return np.asarray(value, np.float64 if keep and value.dtype == np.float64 else np.float32)


def _oddity(name: str, array: np.ndarray) -> str | None:
    """Describes values that no trained network has; None if there are none."""
    if not np.isfinite(array).all():
        return f"{name} (infinite or NaN)"
    if name.endswith("running_var") and (array < 0).any():
        return f"{name} (negative)"
    return None


def _differences(found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> Iterable[str]:
    """Yields a line for each name that is missing, unexpected, or of another shape."""
    missing = {name: shape for name, shape in expected.items() if name not in found}
    unexpected = {name: shape for name, shape in found.items() if name not in expected}
    for count, (name, shape) in enumerate(missing.items()):
        # Most likely the same entry: it has the same shape and a similar name. Comparing all
        # names would take seconds, and a few examples show the pattern.
        alike = [other for other in unexpected if unexpected[other] == shape]
        near = difflib.get_close_matches(name, alike if count < 20 else [], n=1)
        yield f"  missing     {name} {shape}" + (f"; is it {near[0]}?" if near else "")
    for name, shape in unexpected.items():
        is_classifier = len(shape) == 2 and "fc.weight" not in expected.keys() | found.keys()
        hint = "; if it is the classifier, rename it to fc.weight" if is_classifier else ""
        yield f"  unexpected  {name} {shape}{hint}"
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            yield f"  shape       {name} is {found[name]}, must be {shape}"
