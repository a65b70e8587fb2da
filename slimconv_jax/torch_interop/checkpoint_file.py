"""Checkpoint files: what `torch.save` of any age wrote, and safetensors. No file can run code."""

import argparse
import collections
import os
import re
import struct
import types
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimconv_jax.errors import InputError, import_extra
from slimconv_jax.files import new_file

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


def import_torch() -> types.ModuleType:
    """PyTorch, or the command that installs it.

    Raises:
      ValueError: if PyTorch is not installed.
    """
    return import_extra("torch", extra="torch", package="PyTorch")


def read_checkpoint(
    path: os.PathLike | str, *, key: str | None = None
) -> tuple[dict[str, Any], str, list[str]]:
    """The state dict of a checkpoint file.

    Args:
      path: a file of `torch.save`, in the format before PyTorch 1.6 or the zip of today, or
        a .safetensors file.
      key: where in the file the state dict is, keys joined by dots; if None it is
        looked for, first under the usual names.

    Returns:
      The state dict (tensors on the CPU, or NumPy arrays), where it was found ("" at the top),
      and the places of all state dicts in the file.

    Raises:
      ValueError: if the file cannot be read or holds no state dict; also if it asks for more than
        tensors, NumPy scalars and plain containers, which could run code.
    """
    content = _read(Path(path))
    found = dict(_state_dicts(content))
    if key is not None:
        if key not in found:
            there = ", ".join(map(repr, filter(None, found))) or "none"
            raise InputError(f"{path} has no state dict under {key!r}; there are {there}")
        return found[key], key, list(found)
    if not found:
        what = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            what = "a dict of " + (", ".join(map(str, list(content)[:8])) or "nothing")
        raise InputError(f"{path} holds no state dict (tensors by name) but {what}")
    usual = [place for name in USUAL_KEYS for place in found if place.split(".")[-1] == name]
    if len(found) > 1 and not usual:
        places = ", ".join(map(repr, found))
        raise InputError(f"{path} holds several state dicts, {places}; choose one with --key")
    place = usual[0] if usual else next(iter(found))
    return found[place], place, list(found)


def write_checkpoint(
    state_dict: Mapping[str, np.ndarray], path: os.PathLike | str, *, overwrite: bool = False
) -> None:
    """Writes a state dict as `torch.save` does, for `net.load_state_dict(torch.load(path))`.

    The file appears complete, read back and compared, or not at all.

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
            raise InputError(f"cannot write {path}: {_first_line(error)}") from None
        written, _, _ = read_checkpoint(part)
        if written.keys() != state_dict.keys() or not all(
            np.array_equal(written[name].numpy(), array, equal_nan=True)
            for name, array in state_dict.items()
        ):
            raise InputError(f"cannot write {path}: what is read back is not what was written")


def _state_dicts(content: Any, place: str = "", depth: int = 3) -> Iterator[tuple[str, dict]]:
    """Every mapping with a tensor under a dotted name, and where it is."""
    if not isinstance(content, Mapping):
        return
    if any(
        isinstance(name, str) and "." in name and getattr(value, "ndim", 0) > 0
        for name, value in content.items()
    ):
        yield place, dict(content)
    if depth:
        for name, value in content.items():
            yield from _state_dicts(value, f"{place}.{name}" if place else str(name), depth - 1)


def _read(path: Path) -> Any:
    """Whatever the file holds."""
    try:
        if path.is_dir():
            raise InputError(f"{path} is a directory, not a checkpoint file")
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is a pipe or a device, not a checkpoint file")
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not head:
        raise InputError(f"{path} is empty")
    if _is_safetensors(head, path.stat().st_size):
        return _read_safetensors(path)
    if what := _not_a_checkpoint(head):
        raise InputError(f"{path} is {what}, not a checkpoint")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    torch = import_torch()
    if head.startswith(b"PK"):
        _check_zip(path)
    try:
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged file's oddities
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # anything can happen in a damaged file
        raise InputError(f"{path} {_reason(error)}") from None


def _is_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8


def _not_a_checkpoint(head: bytes) -> str | None:
    """What a file is that begins like this, if it is something that people mistake for one."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script", b"<meta")):
        return "a web page (an expired download link gives such a file)"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (git lfs pull gets the file itself)"
    for magic, what in (
        (b"\x1f\x8b", "a gzip archive, to be unpacked first"),
        (b"\xfd7zXZ", "an xz archive, to be unpacked first"),
        (b"\x89HDF", "an HDF5 file"),
        (b"\x93NUMPY", "a NumPy array"),
    ):
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive, to be unpacked first"
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        text = "" if error.start < len(head) - 4 else head[: error.start].decode()
    if text and all(character.isprintable() or character in "\t\r\n\f" for character in text):
        return "a text file"
    return None


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:
        raise InputError(f"{path} is no intact safetensors file: {_first_line(error)}") from None


def _check_zip(path: Path) -> None:
    """Compares the checksums, which `torch.load` does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise InputError(f"{path} is truncated or damaged: {_first_line(error)}") from None
    if damaged is not None:
        raise InputError(f"{path} is damaged: the checksum of {damaged} inside it is wrong")


def _harmless() -> list[Any]:
    """What may stand beside the tensors of a training script's checkpoint."""
    # NumPy renamed numpy.core; files have the old names or the new ones.
    multiarray = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, function in (
            ("scalar", np._core.multiarray.scalar),
            ("_reconstruct", np._core.multiarray._reconstruct),
        )
    ]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDSU"]
    return [
        *multiarray,
        *dtypes,
        np.dtype,
        np.ndarray,
        argparse.Namespace,
        collections.defaultdict,
    ]


def _reason(error: Exception) -> str:
    """Why `torch.load` failed, in a few words."""
    if match := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error)):
        return (
            f"was refused: reading it would run {match[1]} (unless it is damaged), and only "
            "tensors and plain containers are read, so that no file can run code; where you trust "
            "it, load it in PyTorch and save its state_dict() alone"
        )
    if "TorchScript" in str(error):
        return "is a TorchScript archive; save the state_dict() of the module instead"
    return f"is no checkpoint, or is truncated or damaged: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    """The gist of a library's message, of which the first line says enough."""
    # `torch.load` puts its own advice before the line that says what went wrong.
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or "Weights only" in lines[0] or "weights_only" in lines[0]:
        return "its contents make no sense"
    return lines[0]
