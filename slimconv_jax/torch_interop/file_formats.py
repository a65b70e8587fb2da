"""What files of weights hold: PyTorch's of any age, safetensors, pickles, NumPy's, msgpack.

No file can run code: of a pickle nothing is called but what makes tensors, arrays and plain
containers.
"""

import io
import pickle
import re
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from slimconv_jax.errors import LIBRARY_ERRORS, InputError
from slimconv_jax.files import is_address, locate, open_file, read_bytes, read_json
from slimconv_jax.torch_interop import import_torch
from slimconv_jax.torch_interop.pickles import OF_TORCH, SafeUnpickler, check_pickles, harmless

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".pkl", ".npz", ".msgpack", ".ckpt")
_TRAINING = ("optimizer", "scheduler", "scaler", "training_args", "random_states", "rng_state")
"""What the files begin with that training frameworks put beside that of the weights."""

_SAME = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
"""How the weights are named if they lie in a directory in several formats, in order of choice."""

_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")


def checkpoint_files(path: epath.PathLike) -> list[epath.Path]:
    """The files that are meant by one of them, by their index, or by their directory.

    Args:
      path: local, or an address such as gs://bucket/model.safetensors.index.json.

    Raises:
      ValueError: if there are none, or several models.
    """
    path = locate(path)
    try:
        if path.is_dir():
            path = _only_checkpoint(path)
        names = [path.name]
        if path.name.endswith(".index.json"):
            names = _indexed_files(path)
        elif match := _SHARD.fullmatch(path.name):
            stem, number, count, suffix = match.groups()
            if len(count) > 5:  # as Hugging Face's have
                raise InputError(f"{path} is of a model in {count} files, by its name")
            numbers = (f"{i:0{len(number)}}" for i in range(1, int(count) + 1))
            names = [f"{stem}-{number}-of-{count}{suffix}" for number in numbers]
        files = [path.parent / name for name in names]
        missing = [file.name for file in files if not file.exists()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if missing and len(files) > 1:
        raise InputError(f"{path} is of a model in {len(files)} files; {missing[0]} is missing")
    return files


def _only_checkpoint(directory: epath.Path) -> epath.Path:
    """The file that is meant by a directory."""
    files = [path for path in directory.iterdir() if not path.name.startswith(_TRAINING)]
    files = sorted(path for path in files if path.is_file())
    indices = [path for path in files if path.name.endswith(".index.json")]
    firsts = [p for p in files if (match := _SHARD.fullmatch(p.name)) and int(match[2]) == 1]
    single = [p for p in files if p.suffix in _SUFFIXES and not _SHARD.fullmatch(p.name)]
    for candidates in (indices, firsts, single):
        names = [path.name for path in candidates]
        if len(candidates) == 1:
            return candidates[0]
        if candidates and all(name in _SAME for name in names):
            return directory / min(names, key=_SAME.index)
        if candidates:
            names = ", ".join(path.name for path in candidates[:8])
            raise InputError(f"{directory} has several checkpoints, {names}; give one of them")
    raise InputError(f"{directory} is a directory without a checkpoint file")


def _indexed_files(path: epath.Path) -> list[str]:
    """The names of the files that an index names, all in its own directory."""
    index = read_json(path)
    try:
        names = sorted(set(index["weight_map"].values()))
        if not names or not all(Path(name).name == name for name in names):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} is not an index of the files of a model") from None
    return names


def read_files(files: Sequence[epath.Path]) -> Any:
    """What the file of a model, or all its files together, hold.

    Args:
      files: from `checkpoint_files`.

    Raises:
      ValueError: if one cannot be read, or reading it could run code.
    """
    contents = [_read_anywhere(file) for file in files]
    if len(contents) == 1:
        return contents[0]
    merged = {}
    for file, content in zip(files, contents, strict=True):
        if not isinstance(content, Mapping):
            raise InputError(f"{file} holds no tensors by name")
        if twice := merged.keys() & content.keys():
            raise InputError(f"{min(map(str, twice))} is in several files, such as {file}")
        merged |= content
    return merged


def _read_anywhere(file: epath.Path) -> Any:
    """What a file holds, of which there is a copy for the time if it is in an object store."""
    if not is_address(file):
        return _read_one(Path(file))
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / file.name
        try:
            copy.write_bytes(file.read_bytes())
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror or error}") from None
        return _read_one(copy)


def _read_one(path: Path) -> Any:
    """Whatever the file holds."""
    try:
        with open_file(path) as file:
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
    if head.startswith(b"PK"):
        _check_zip(path)
        if _is_npz(path):
            return _guarded(path, lambda: _read_npz(path), "npz")
    if path.suffix == ".msgpack" or _is_msgpack(head):
        return _guarded(path, lambda: _read_msgpack(path), "msgpack")
    if _is_plain_pickle(head) or (path.suffix in (".pkl", ".pickle") and head[0] not in b"\x80P"):
        check_pickles(content := io.BytesIO(_read_whole(path)), path)
        content.seek(0)
        return _guarded(path, lambda: SafeUnpickler(content, path).load())
    torch = import_torch()
    if not head.startswith(b"PK"):
        with open_file(path) as file, io.BufferedReader(file) as stream:
            check_pickles(stream, path, OF_TORCH)

    def load() -> Any:
        # Tensors without values, which are called so when they are used.
        lazy = [torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer]
        with torch.serialization.safe_globals([*harmless(), *lazy]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged file's oddities
            return torch.load(path, map_location="cpu", weights_only=True)

    return _guarded(path, load)


def _read_whole(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _guarded(path: Path, load: Callable[[], Any], kind: str = "") -> Any:
    """What a function reads from a file, or a sentence about why it cannot."""
    try:
        return load()
    except InputError:
        raise
    except LIBRARY_ERRORS as error:
        reason = f"is not an intact {kind} file: {first_line(error)}" if kind else _reason(error)
        raise InputError(f"{path} {reason}") from None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_msgpack(path: Path) -> dict[str, Any]:
    """The arrays of a file of `flax.serialization`; the keys that lead to them joined by dots."""
    from flax import serialization, traverse_util

    return traverse_util.flatten_dict(serialization.msgpack_restore(_read_whole(path)), sep=".")


_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[2:]
"""What files of `torch.save` begin with, before PyTorch 1.6, after the number of the protocol."""


def _is_plain_pickle(head: bytes) -> bool:
    return head[:1] == b"\x80" and head[1] <= 5 and not head[2:].startswith(_LEGACY_MAGIC)


def _is_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8


def _is_msgpack(head: bytes) -> bool:
    return 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)  # a map that is not empty


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
        (b"BZh", "a bzip2 archive, to be unpacked first"),
        (b"\x28\xb5\x2f\xfd", "a Zstandard archive, to be unpacked first"),
        (b"7z\xbc\xaf", "a 7z archive, to be unpacked first"),
        (b"GGUF", "a GGUF file"),
        *((b"\x08%c\x12" % version, "an ONNX file") for version in range(1, 32)),
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
    except (AttributeError, TypeError):  # of dtypes that NumPy has not, such as float8
        import_torch()
        import safetensors.torch

        return safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is not an intact safetensors file: {first_line(error)}") from None


_EXPANSION = 8
"""How many times as large as a file what is in it may be, beyond `_ALWAYS`.

Numbers of one byte become float32, and a few tensors may share their memory.
"""
_ALWAYS = 2**26


def require_size(what: str, size: int, path: Path | str, of: int) -> None:
    """Makes sure that what a file claims to hold is about as large as the file.

    Args:
      what: claims it.
      size: in bytes.
      path: of the file.
      of: its size in bytes.

    Raises:
      ValueError: if it is far larger.
    """
    if size > _ALWAYS + _EXPANSION * of:
        raise InputError(
            f"{path} is a file of {of:,} bytes, and {what} claims {size:,}; no model is written so"
        )


def _check_zip(path: Path) -> None:
    """Compares the checksums, which `torch.load` does not, once the sizes make sense."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                require_size(f"{member.filename} inside it", member.file_size, path, _size(path))
            total = sum(member.file_size for member in members)
            require_size("what is inside it", total, path, _size(path))
            damaged = archive.testzip()
            pickles = [archive.read(m) for m in members if m.filename.lower().endswith("data.pkl")]
    except InputError:
        raise
    except LIBRARY_ERRORS as error:
        raise InputError(f"{path} is truncated or damaged: {first_line(error)}") from None
    if damaged is not None:
        raise InputError(f"{path} is damaged: the checksum of {damaged} inside it is wrong")
    for content in pickles:
        check_pickles(io.BytesIO(content), path)


def _size(path: Path) -> int:
    return path.stat().st_size


def is_array(value: object) -> bool:
    """Whether something is an array of NumPy or JAX, or a tensor of PyTorch."""
    torch = sys.modules.get("torch")
    return isinstance(value, (np.ndarray, np.generic, jax.Array)) or (
        torch is not None and isinstance(value, torch.Tensor)
    )


def _is_npz(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inside = [name for name in names if name.endswith(_SUFFIXES)]
    if inside and not any(name.endswith("data.pkl") for name in names):  # as in PyTorch's own
        raise InputError(f"{path} is an archive with {inside[0]} in it, to be unpacked first")
    return all(name.endswith(".npy") for name in names)


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
    return f"is not a checkpoint, or is truncated or damaged: {first_line(error)}"


def first_line(error: Exception) -> str:
    """The gist of a library's message, of which the first line says enough."""
    # `torch.load` puts its own advice before the line that says what went wrong.
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or "Weights only" in lines[0] or "weights_only" in lines[0]:
        return "its contents make no sense"
    return lines[0]
