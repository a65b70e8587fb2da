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
from slimconv_jax.torch_interop.names import entries
from slimconv_jax.torch_interop.strangers import looks_like

_LEAF = re.compile(r"(?:.*\.)?(?:weight|bias|running_mean|running_var)")
_COUNTER = re.compile(r"(?:.*\.)?num_batches_tracked")
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_wrapped_module|"
    r"_forward_module|_orig_mod|base_layer|module)\."
)
"""What wrappers of PyTorch put into the names of what they wrap, at the front or inside."""

_PREFIX = re.compile(r"(.*\.|)(layer[1-4]\.\d+\..+)")


def from_torch(
    state_dict: Mapping[str, Any],
    *,
    arch: str | os.PathLike | None = None,
    k: CompressionRatio | None = None,
    dtype: Dtype | None = None,
) -> ResNet:
    """The model of a PyTorch state dict, in evaluation mode.

    Its architecture is read off the shapes: blocks, width, k, groups, stem and classes; without
    `fc` it has no classifier. Strides, dilation, anti-aliasing (timm's `aa_layer`) and the like
    leave no trace in shapes: they are those of the published networks. A network that was trained
    with dilation computes the same only after `backbone(model, output_stride=...)`.

    Args:
      state_dict: PyTorch tensors or NumPy arrays by name, the released ones or torchvision's,
        with or without a prefix such as `module.`. Entries of half precision become float32.
        Everything but `num_batches_tracked` must be used.
      arch: the name that the architecture must have, one of `list_models()`, at any k, width
        and number of classes; or a JSON file of channels, for networks of irregular widths (at the
        width of the file), which are not read off shapes.
      k: the compression ratio that it must have. To be given where the network is
        so narrow that its shapes do not tell.
      dtype: dtype of the computation, as in `create_model`.

    Warns:
      UserWarning: if weights are infinite or NaN, or variances negative, with the names.

    Raises:
      ValueError: if the entries are not exactly those of one of our architectures; the
        message lists all that are missing, unexpected and of another shape.
    """
    if not isinstance(state_dict, Mapping):
        raise InputError(
            f"from_torch takes a state dict, such as net.state_dict(), not a "
            f"{type(state_dict).__name__}"
        )
    arrays = clean_state_dict(state_dict)
    if not arrays:
        keys = ", ".join(map(repr, list(state_dict)[:8])) or "nothing"
        raise InputError(
            f"a state dict has tensors by name, and this has {keys}; of a whole checkpoint, pass "
            "the state dict inside, such as checkpoint['state_dict']"
        )
    shapes = {name: array.shape for name, array in arrays.items()}
    is_file = arch is not None and is_channels_file(arch)
    if is_file:
        if k is not None:
            raise InputError(f"{arch} has no SlimConv, so it takes no k (k={k!r} was given)")
        config = dataclasses.replace(named_config(arch), **read_ends(shapes))
    else:
        try:
            config = read_architecture(shapes, k=k)
        except InputError as error:
            if stranger := looks_like(shapes):
                raise InputError(f"this looks like {stranger}: {error}") from None
            raise
    if arch is not None and not is_file and name_of(config) != arch:
        named_config(arch)  # raises if there is none
        # Where only blocks are missing or too many, the report says which.
        complete = dataclasses.replace(config, blocks=ARCHITECTURES[arch].blocks)
        if name_of(config) is None and name_of(complete) == arch:
            config = complete
        else:
            raise InputError(
                f"{arch} was asked for, and the entries are those of {describe(config)}"
            )
    dtype = as_dtype(dtype)
    try:
        model = abstract_resnet(config, dtype=dtype)
    except InputError as error:
        raise InputError(f"the shapes are those of no ResNet: {error}") from None
    table = entries(model)
    expected = {name: entry.shape for name, entry in table.items()}
    if shapes != expected:
        irregular = ""
        if config.block == "bottleneck" and config.reduction is None:
            irregular = " (if its widths are irregular, `arch` must be a JSON file of them)"
        stranger = looks_like(shapes)
        raise InputError(
            (f"this looks like {stranger}: " if stranger else "")
            + f"the entries are not those of {describe(config)}"
            + (":\n" if arch else f", which they come nearest to{irregular}:\n")
            + "\n".join(_differences(shapes, expected))
        )
    if odd := [*filter(None, (_oddity(name, array) for name, array in arrays.items()))]:
        warnings.warn(f"these entries look damaged: {', '.join(odd)}", InputWarning, stacklevel=2)
    for name, entry in table.items():
        entry.variable.set_value(jnp.array(entry.to_ours(arrays[name])))
    model.eval()
    return model


def to_torch(model: ResNet) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a model: NumPy arrays by released name, in PyTorch's layout.

    `num_batches_tracked` is left out: it is not a part of the function, and PyTorch does
    without it, also where it is strict.

    Raises:
      ValueError: if the model is not a ResNet of this package, or not any longer
        (`fold_batch_norm`).
    """
    require_resnet(model, "to_torch")
    return {
        name: entry.to_torch(np.asarray(entry.variable[...]))
        for name, entry in entries(model).items()
    }


def rename(
    state_dict: Mapping[str, Any], substitutions: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    """The state dict under other names.

    Args:
      state_dict: anything by name.
      substitutions: regular expressions and their replacements, applied in order to every name,
        prefixes included, as `re.sub` does. An entry whose name becomes empty is left out.

    Raises:
      ValueError: if a regular expression is none or matches no name, or two entries get the
        same name.
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
"""The characters of the longest name; PyTorch's have some dozens."""


def _names(state_dict: Mapping[str, Any]) -> list[str]:
    """The names in a state dict, whose keys may be something else too.

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
    """The parameters and statistics of a state dict, without prefix, in float32 or float64.

    Raises:
      ValueError: if one of them is not a dense floating-point tensor, or the names are
        those of several networks.
    """
    arrays = {}
    for full_name in _names(state_dict):
        if _COUNTER.fullmatch(full_name):
            continue
        value = state_dict[full_name]
        name = _WRAPPERS.sub("", full_name)
        if not _LEAF.fullmatch(name) and not (is_array(value) and (value.ndim or "." in name)):
            continue  # what else a file holds beside its tensors, such as a best accuracy
        array = _as_array(value)
        if isinstance(array, str):
            raise InputError(f"{full_name} is {array}; a dense floating-point tensor is needed")
        if name in arrays:
            raise InputError(f"{name} is there twice, with and without the name of a wrapper")
        if array.size:  # a classifier of no classes has none
            arrays[name] = array
    blocks: dict[str, set[str]] = {}
    for name in arrays:
        if match := _PREFIX.fullmatch(name):
            blocks.setdefault(match[1], set()).add(match[2])
    if not blocks:
        return arrays
    prefix = max(blocks, key=lambda prefix: len(blocks[prefix]))
    for other, names in blocks.items():
        if other != prefix and names & blocks[prefix]:
            raise InputError(
                f"there are several networks, under the prefixes {prefix!r} and {other!r}; leave "
                "one of them out, which renaming its entries to nothing does"
            )
    clean = {}
    for name, array in arrays.items():
        stripped = name.removeprefix(prefix)
        if stripped in clean:
            raise InputError(f"{stripped} is there twice, with and without the prefix {prefix!r}")
        clean[stripped] = array
    return clean


def _as_array(value: Any) -> np.ndarray | str:
    """A tensor or array in float32, or in float64 where JAX has that switched on.

    A string that says what it is if it is not a dense floating-point tensor.
    """
    keep = jax.config.jax_enable_x64
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if torch.nn.parameter.is_lazy(value):
            return "a tensor without values yet, of a lazy module"
        # One without what a file may have set on it: attributes in place of methods.
        value = torch.Tensor.detach(value)
        for what, is_so in (
            ("that is quantised", lambda value: value.is_quantized),
            ("that is nested", lambda value: value.is_nested),
            ("that is sparse", lambda value: value.layout != torch.strided),
            ("without values, on the meta device", lambda value: value.device.type == "meta"),
            (f"of type {value.dtype}", lambda value: not value.is_floating_point()),
        ):
            if is_so(value):
                return f"a tensor {what}"
        wide = torch.float64 if keep and value.dtype == torch.float64 else torch.float32
        try:
            return value.resolve_neg().to("cpu", wide).numpy()
        except (
            NotImplementedError,
            RuntimeError,
            TypeError,
        ):  # of subclasses with a mind of their own
            return f"a {type(value).__name__}, a tensor that does not give its values away"
    if not is_array(value):
        return f"a {type(value).__name__}"
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"an array of type {value.dtype}"
    with np.errstate(over="ignore"):  # what becomes infinite is reported by name
        return np.asarray(value, np.float64 if keep and value.dtype == np.float64 else np.float32)


def _oddity(name: str, array: np.ndarray) -> str | None:
    """What no trained network has."""
    if not np.isfinite(array).all():
        return f"{name} (infinite or NaN)"
    if name.endswith("running_var") and (array < 0).any():
        return f"{name} (negative)"
    return None


def _differences(found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> Iterable[str]:
    """A line for each name that is missing, unexpected, or of another shape."""
    missing = {name: shape for name, shape in expected.items() if name not in found}
    unexpected = {name: shape for name, shape in found.items() if name not in expected}
    for count, (name, shape) in enumerate(missing.items()):
        # Of the same shape and with a name like it: most likely the same entry. To compare all
        # names would take seconds, and a few examples tell a pattern.
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
