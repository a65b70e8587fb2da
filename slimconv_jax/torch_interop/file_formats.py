"""Reads files of weights: PyTorch's of any age, safetensors, pickles, NumPy's, msgpack.

No file can run code: a pickle can only call what makes tensors, arrays and plain containers.
"""

import contextlib
import io
import pickle
import re
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
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
"""How the names of files begin that training frameworks put beside the weights."""

_SAME = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
"""The names of weights in a directory that has them in several formats, the preferred first."""

_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")


def checkpoint_files(path: epath.PathLike) -> list[epath.Path]:
    """Returns the files of a model, given one of them, their index, or their directory.

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
                raise InputError(
                    f"{path} is part of a model in {count} files, according to its name"
                )
            numbers = (f"{i:0{len(number)}}" for i in range(1, int(count) + 1))
            names = [f"{stem}-{number}-of-{count}{suffix}" for number in numbers]
        files = [path.parent / name for name in names]
        missing = [file.name for file in files if not file.exists()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if missing and len(files) > 1:
        raise InputError(
            f"{path} is part of a model in {len(files)} files; {missing[0]} is missing"
        )
    return files


def _only_checkpoint(directory: epath.Path) -> epath.Path:
    """Returns the file to read in a directory."""
    files = [path for path in directory.iterdir() if not path.name.startswith(_TRAINING)]
    files = sorted(path for path in files if path.is_file())
    indices = [path for path in files if path.name.endswith(".index.json")]
    firsts = [p for p in files if (match := _SHARD.fullmatch(p.name)) and int(match[2]) == 1]
    single = [p for p in files if p.suffix in _SUFFIXES and not _SHARD.fullmatch(p.name)]
    for candidates in (indices, firsts, single):
        names = [path.name for path in candidates]
        if len(names) == 1:
            return candidates[0]
        if names and set(names) <= set(_SAME):
            return directory / min(names, key=_SAME.index)
        if names:
            some = ", ".join(names[:8])
            raise InputError(f"{directory} has several checkpoints, {some}; give one of them")
    raise InputError(f"{directory} is a directory without a checkpoint file")


def _indexed_files(path: epath.Path) -> list[str]:
    """Returns the names of the files in an index, all in its own directory."""
    index = read_json(path)
    try:
        names = sorted(set(index["weight_map"].values()))
        if not names or not all(Path(name).name == name for name in names):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} is not an index of the files of a model") from None
    return names


def read_files(files: Sequence[epath.Path]) -> Any:
    """Reads the file of a model, or all its files together.

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
    """Reads a file, by way of a temporary copy if it is in an object store."""
    try:
        if not is_address(file):
            return _read_one(Path(file))
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory) / file.name
            copy.write_bytes(file.read_bytes())
            return _read_one(copy)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from None


def _read_one(path: Path) -> Any:
    """Reads a local file in whatever format it is."""
    with open_file(path) as file:
        head = file.read(1024)
    if not head:
        raise InputError(f"{path} is empty")
    is_safetensors = _is_safetensors(head, path.stat().st_size)
    if not is_safetensors and (what := _not_a_checkpoint(head)):
        raise InputError(f"{path} is {what}, not a checkpoint")
    if is_safetensors or path.suffix == ".safetensors":
        return _read_safetensors(path)
    is_zip = head.startswith(b"PK")
    if is_zip and _is_npz(path):
        with (
            _explained(path, "is not an intact npz file"),
            np.load(path, allow_pickle=False) as arrays,
        ):
            return dict(arrays)
    if path.suffix == ".msgpack" or _is_msgpack(head):
        from flax import serialization, traverse_util

        content = read_bytes(path)
        with _explained(path, "is not an intact msgpack file"):
            return traverse_util.flatten_dict(serialization.msgpack_restore(content), sep=".")
    if _is_plain_pickle(head) or (path.suffix in (".pkl", ".pickle") and head[0] not in b"\x80P"):
        stream = io.BytesIO(read_bytes(path))
        with _explained(path):
            check_pickles(stream, path)
            stream.seek(0)
            return SafeUnpickler(stream, path).load()
    torch = import_torch()
    allowed = [(value, name) for name, value in harmless().items()]
    # Tensors without values, which are reported as such when they are used.
    allowed += [torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer]
    with (
        _explained(path),
        torch.serialization.safe_globals(allowed),
        warnings.catch_warnings(action="ignore"),  # about oddities of a damaged file
    ):
        if not is_zip:
            with open_file(path) as file, io.BufferedReader(file) as stream:
                check_pickles(stream, path, OF_TORCH)
        return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _explained(
    path: Path, what: str = "is not a checkpoint, or is truncated or damaged"
) -> Iterator[None]:
    """Turns the error of a library that cannot read a file into a sentence about the file."""
    try:
        yield
    except InputError:
        raise
    except LIBRARY_ERRORS as error:
        what = f"{what}: {first_line(error)}"
        if match := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error)):
            what = (
                f"was refused: reading it would run {match[1]} (unless it is damaged), and only "
                "tensors and plain containers are read, so that no file can run code; where you "
                "trust it, load it in PyTorch and save its state_dict() alone"
            )
        elif "TorchScript" in str(error):
            what = "is a TorchScript archive; save the state_dict() of the module instead"
        raise InputError(f"{path} {what}") from None


_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[2:]
"""How files of `torch.save` began before PyTorch 1.6, after the number of the protocol."""


def _is_plain_pickle(head: bytes) -> bool:
    return head[:1] == b"\x80" and head[1] <= 5 and not head[2:].startswith(_LEGACY_MAGIC)


def _is_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8


def _is_msgpack(head: bytes) -> bool:
    return 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)  # a map that is not empty


def _not_a_checkpoint(head: bytes) -> str | None:
    """Returns what a file is, by its beginning, if people mistake such files for checkpoints."""
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
    except (AttributeError, TypeError):  # of dtypes that NumPy does not have, such as float8
        import_torch()
        import safetensors.torch

        return safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is not an intact safetensors file: {first_line(error)}") from None


_EXPANSION = 8
"""How many times as large as a file its content may be, beyond `_ALWAYS` bytes.

Numbers of one byte become float32, and a few tensors may share their memory.
"""
_ALWAYS = 2**26


def require_size(what: str, size: int, path: Path | str, of: int) -> None:
    """Checks that what a file claims to hold is about as large as the file.

    Args:
      what: the part of the file that claims a size.
      size: the size that it claims, in bytes.
      path: of the file.
      of: the size of the file in bytes.

    Raises:
      ValueError: if it claims far more.
    """
    most = _ALWAYS + _EXPANSION * of
    if size > most:
        raise InputError(
            f"{path} is a file of {of:,} bytes, and {what} claims {size:,}; at most {most:,} are "
            "allowed"
        )


def is_array(value: object) -> bool:
    """Returns whether something is an array of NumPy or JAX, or a tensor of PyTorch."""
    torch = sys.modules.get("torch")
    tensors = () if torch is None else torch.Tensor
    return isinstance(value, (np.ndarray, np.generic, jax.Array, tensors))


def _is_npz(path: Path) -> bool:
    """Checks a zip archive, and returns whether NumPy wrote it.

    Its checksums are compared, which `torch.load` does not do, once the sizes make sense.
    """
    size = path.stat().st_size
    with _explained(path, "is truncated or damaged"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            require_size(f"{member.filename} inside it", member.file_size, path, size)
        require_size("what is inside it", sum(m.file_size for m in members), path, size)
        if (damaged := archive.testzip()) is not None:
            raise InputError(f"{path} is damaged: the checksum of {damaged} inside it is wrong")
        pickles = [archive.read(m) for m in members if m.filename.lower().endswith("data.pkl")]
    with _explained(path):
        for content in pickles:
            check_pickles(io.BytesIO(content), path)
    names = [member.filename for member in members]
    inside = [name for name in names if name.endswith(_SUFFIXES)]
    if inside and not any(name.endswith("data.pkl") for name in names):  # as in PyTorch's own
        raise InputError(f"{path} is an archive with {inside[0]} in it, to be unpacked first")
    return all(name.endswith(".npy") for name in names)


def first_line(error: Exception) -> str:
    """Returns the first line of a library's message, which says enough."""
    # `torch.load` puts advice before the line that says what went wrong.
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or "Weights only" in lines[0] or "weights_only" in lines[0]:
        return "its contents make no sense"
    return lines[0]
