"""Reads the state dict in a checkpoint file, and writes such a file."""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from slimconv_jax.errors import InputError
from slimconv_jax.files import new_file
from slimconv_jax.torch_interop import import_torch
from slimconv_jax.torch_interop.file_formats import (
    checkpoint_files,
    first_line,
    is_array,
    read_files,
    require_size,
)

USUAL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "network",
    "net",
    "module",
    "weights",
    "params",
    "ema",
    "model_ema",
    "ema_state_dict",
    "state_dict_ema",
)
"""Where training scripts keep the state dict, the first of them preferred."""


def read_checkpoint(
    path: epath.PathLike, *, key: str | None = None
) -> tuple[dict[str, Any], str, list[str]]:
    """Reads the state dict of a checkpoint file.

    Args:
      path: a file of `torch.save`, in the format before PyTorch 1.6 or the zip of today; a
        .safetensors, .npz or .msgpack file, or a pickle of arrays; the index of a model in several
        files (`model.safetensors.index.json`), one of these files, or their directory.
      key: where in the file the state dict is, keys joined by dots; None to search for it, first
        under the usual names.

    Returns:
      The state dict (tensors on the CPU, or NumPy arrays), where it was found ("" at the top),
      and the places of all state dicts in the file.

    Raises:
      ValueError: if the file cannot be read or holds no state dict; also if it needs more than
        tensors, NumPy scalars and plain containers, which could run code.
    """
    files = checkpoint_files(path)
    content = read_files(files)
    found = dict(_state_dicts(content))
    if key is not None and key not in found:
        there = ", ".join(map(repr, [place for place in found if place][:8])) or "none"
        raise InputError(f"{path} has no state dict under {key!r}; there are {there}")
    if not found:
        what = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            some = (key for key in list(content)[:8] if isinstance(key, str | int))
            what = "a dict of " + (", ".join(f"{key!s:.80}" for key in some) or "nothing")
        raise InputError(f"{path} holds {what}, not a state dict (tensors by name)")
    usual = [place for name in USUAL_KEYS for place in found if place.split(".")[-1] == name]
    if key is None and len(found) > 1 and not usual:
        places = ", ".join(map(repr, list(found)[:8])) + (", ..." if len(found) > 8 else "")
        raise InputError(f"{path} holds several state dicts, {places}; choose one with --key")
    place = next(iter(usual or found)) if key is None else key
    _check_sizes(found[place], files)
    return dict(found[place]), place, list(found)


def write_checkpoint(
    state_dict: Mapping[str, np.ndarray], path: os.PathLike | str, *, overwrite: bool = False
) -> None:
    """Writes a state dict as `torch.save` does, for `net.load_state_dict(torch.load(path))`.

    The file appears once it is complete, read back and compared, or not at all.

    Raises:
      ValueError: if PyTorch is not installed, or the file exists (and is not to be overwritten)
        or cannot be written.
    """
    torch = import_torch()
    with new_file(path, overwrite=overwrite) as part:
        try:
            with open(part, "wb") as file:
                torch.save({name: torch.tensor(array) for name, array in state_dict.items()}, file)
        except RuntimeError as error:  # PyTorch's, when the disk is full
            raise InputError(f"cannot write {path}: {first_line(error)}") from None
        written, _, _ = read_checkpoint(part)
        if written.keys() != state_dict.keys() or not all(
            np.array_equal(written[name].numpy(), array, equal_nan=True)
            for name, array in state_dict.items()
        ):
            raise InputError(f"cannot write {path}: what is read back is not what was written")


def _state_dicts(content: Any) -> Iterator[tuple[str, Mapping]]:
    """Yields each mapping with a tensor under a dotted name, and its place, at most three deep."""
    layer, seen = [("", content)], {}
    for _ in range(4):
        below = []
        for place, value in layer:
            if not isinstance(value, Mapping):
                continue
            if id(value) not in seen:  # a file may have the same one in many places
                named = [(name, inner) for name, inner in value.items() if isinstance(name, str)]
                seen[id(value)] = any("." in n and is_array(v) and v.ndim > 0 for n, v in named)
                below += [(f"{place}.{name}" if place else name, inner) for name, inner in named]
            if seen[id(value)]:
                yield place, value
        layer = below


def _check_sizes(state_dict: Mapping[Any, Any], files: Sequence[epath.Path]) -> None:
    """Checks that the tensors are about as large as the files, before their values are used.

    A tensor may repeat one number 10^12 times, and an array may have memory that was never read.
    """
    of = sum(file.stat().length for file in files)
    total = 0
    for name, value in state_dict.items():
        if is_array(value):
            with contextlib.suppress(RuntimeError):  # of tensors without a shape, refused later
                total += 4 * math.prod(value.shape)
            require_size(f"{name!s:.80}", total, files[0].name, of)
