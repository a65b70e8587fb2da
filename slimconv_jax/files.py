"""Reads, lists, verifies and atomically writes files on disk or in an object store."""

import contextlib
import errno
import hashlib
import io
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from slimconv_jax.errors import InputError

MOST_BYTES = 2**30
"""The size limit, in bytes, of a file that is read into memory."""

MOST_TEXT = 2**24
"""The size limit, in bytes, of a text file."""

DEEPEST = 32
"""How deeply the containers of a JSON file may be nested."""


class MissingFileError(InputError):
    """A file does not exist; other errors mean that it is damaged or unreadable."""


def locate(path: epath.PathLike) -> epath.Path:
    """Returns a path, local or in an object store.

    Raises:
      ValueError: if such an address is not supported, or its package is not installed.
    """
    try:
        path = epath.Path(path)
        if not is_address(path):
            return path.expanduser()
        path.exists()
    except ImportError as error:
        install = ""
        if os.fspath(path).startswith("gs://"):
            install = ": pip install 'slimconv_jax[gcs]', or, in a clone, pip install -e '.[gcs]'"
        raise InputError(f"{path} needs another package ({error}){install}") from None
    except (KeyError, ValueError):
        raise InputError(
            f"{path} is an address that nothing here reads; a local path and gs://... are"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    return path


def is_address(path: epath.PathLike) -> bool:
    """Returns whether a path is in an object store, such as gs://bucket/photos."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns a path that does not depend on the working directory, as Orbax needs it.

    Raises:
      ValueError: as `locate`.
    """
    path = locate(path)
    try:
        return path if is_address(path) else path.resolve()
    except (OSError, RuntimeError):  # of a loop of links; the latter until Python 3.13
        raise InputError(f"cannot read {path}: {os.strerror(errno.ELOOP)}") from None


def open_file(file: epath.PathLike) -> BinaryIO:
    """Opens a file for reading, local or in an object store.

    Raises:
      OSError: if it cannot be read, or is a pipe, a socket or a device, which might block or never
        end.
      ValueError: as `locate`.
    """
    if is_address(file):
        return _from_store(file, lambda path: path.open("rb"))
    # Most files are read whole, so Python's buffer would only cost a copy.
    stream = open(file, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115
    kind = os.fstat(stream.fileno()).st_mode
    if stat.S_ISFIFO(kind) and os.fspath(file).startswith(("/dev/fd/", "/proc/self/fd/")):
        os.set_blocking(stream.fileno(), True)  # opened by a shell, as for <(...)
        return io.BufferedReader(stream)
    if not stat.S_ISREG(kind):
        stream.close()
        raise OSError(errno.EINVAL, "It is a pipe or a device, not a file", os.fspath(file))
    return stream


def _from_store(file: epath.PathLike, read: Callable[[epath.Path], Any]) -> Any:
    try:
        return read(epath.Path(file))
    except (ImportError, KeyError, ValueError):
        locate(file)  # raises a sentence about the address
        raise


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a pipe waits for its other end


def read_bytes(file: epath.PathLike, most: int = MOST_BYTES) -> bytes:
    """Reads a file.

    Raises:
      OSError: as `open_file`, or if it has more than `most` bytes.
    """
    if is_address(file):
        return _from_store(file, lambda path: path.read_bytes())
    with open_file(file) as stream:
        is_longer = os.fstat(stream.fileno()).st_size > most
        content = b"" if is_longer else stream.read(most + 1)
    if is_longer or len(content) > most:
        raise OSError(errno.EFBIG, f"It has more than {most} bytes", os.fspath(file))
    return content


def read_text(file: epath.PathLike) -> str:
    """Reads a text file in UTF-8, with or without a byte-order mark.

    Raises:
      OSError: as `open_file`, or if it has more than `MOST_TEXT` bytes.
      UnicodeDecodeError: if it is not UTF-8.
    """
    return read_bytes(file, MOST_TEXT).decode("utf-8-sig")


def read_json(file: epath.PathLike) -> Any:
    """Reads a JSON file; every JSON file of this package is read here.

    Raises:
      MissingFileError: if it does not exist.
      ValueError: if it cannot be read, has more than `MOST_TEXT` bytes, is not JSON, or nests
        containers more deeply than `DEEPEST`.
    """
    try:
        return parse_json(read_text(file))
    except InputError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"there is no file {file}") from None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{file} is damaged: it is not JSON ({error})") from None


def parse_json(text: str | bytes) -> Any:
    """Parses a JSON text.

    Raises:
      ValueError: if it is not JSON, or nests containers more deeply than `DEEPEST`.
    """
    too_deep = f"it is nested more than {DEEPEST} deep"
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(too_deep) from None
    values = [content]
    for _ in range(DEEPEST):
        containers = [value for value in values if isinstance(value, dict | list)]
        values = [inner for c in containers for inner in (c.values() if isinstance(c, dict) else c)]
    if any(isinstance(value, dict | list) for value in values):
        raise ValueError(too_deep)
    return content


@contextlib.contextmanager
def new_file(path: os.PathLike | str, *, overwrite: bool) -> Iterator[Path]:
    """Yields a file that gets its name when the block ends, and is deleted if the block fails.

    Raises:
      ValueError: if the file exists and `overwrite` is False, or it cannot be written.
    """
    if os.fspath(path).endswith("/"):
        raise InputError(f"{path} must be the name of a file, not of a directory")
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        what = "it is a directory" if path.is_dir() else "--overwrite (overwrite=True) replaces it"
        raise InputError(f"{path} exists already; {what}")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        part.touch()  # raises before long work
        yield part
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def replace_file(file: epath.Path, content: bytes) -> None:
    """Writes a file atomically."""
    part = file.with_name(f"{file.name}.part")
    if not is_address(file):
        part.unlink(missing_ok=True)  # left by a run that was killed; a link would be followed
    part.write_bytes(content)
    part.replace(file)


def list_files(directory: epath.Path, parent: str = "") -> dict[str, epath.Path]:
    """Returns all files below a directory by relative path; links to directories are files."""
    files = {}
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not os.path.islink(path):
            files |= list_files(path, f"{parent}{path.name}/")
        else:
            files[parent + path.name] = path
    return files


def checksum(file: epath.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal.

    Raises:
      OSError: as `open_file`.
    """
    with open_file(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_files(
    directory: epath.Path, checksums: Mapping[str, str], *, of: Iterable[epath.Path] = ()
) -> None:
    """Checks that the files in a directory are as they were written.

    Args:
      directory: what the names are relative to.
      checksums: SHA-256 by name; the name of a file in a subdirectory has slashes.
      of: the files and subdirectories that must not have files without a checksum.

    Raises:
      ValueError: if a file differs or has no checksum, or a name leads out of the directory.
    """
    for name, expected in checksums.items():
        parts = name.split("/")
        if not name.isprintable() or not {"", ".", ".."}.isdisjoint(parts):
            raise InputError(f"{directory} lists {name!r}, which is not the name of a file in it")
        try:
            intact = checksum(directory / name) == expected
        except OSError as error:
            raise InputError(f"cannot read {directory / name}: {error.strerror}") from None
        if not intact:
            raise InputError(f"{directory / name} is damaged: its SHA-256 is not the one written")
    for part in of:
        there = list_files(part, f"{part.name}/") if part.is_dir() else [part.name]
        if unknown := [name for name in there if name not in checksums]:
            raise InputError(f"{directory / unknown[0]} has no checksum, so it is not read")


def check_outputs(*paths: Path | None) -> None:
    """Checks that files can be written, before long work.

    Raises:
      ValueError: if one is a directory, or its directory does not exist.
    """
    for path in filter(None, paths):
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a directory")
        if not path.absolute().parent.is_dir():
            raise InputError(f"cannot write {path}: there is no directory {path.parent}")


def write_json(path: Path, report: Mapping | Sequence) -> None:
    """Writes figures as JSON.

    Raises:
      ValueError: if the file cannot be written.
    """
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
