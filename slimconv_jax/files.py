"""Files and directories on disk or in an object store: written whole, listed, and summed."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from slimconv_jax.errors import InputError


def locate(path: epath.PathLike) -> epath.Path:
    """A path, local or in an object store.

    Raises:
      ValueError: if nothing reads such addresses, or what does is not installed.
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
    except KeyError:
        raise InputError(
            f"{path} is an address that nothing here reads; a local path and gs://... are"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    return path


def is_address(path: epath.PathLike) -> bool:
    """Whether a path is in an object store, such as gs://bucket/photos."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that does not depend on the working directory, as Orbax needs it.

    Raises:
      ValueError: as `locate`.
    """
    path = locate(path)
    return path if is_address(path) else path.resolve()


def read_text(file: epath.PathLike) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark.

    Raises:
      OSError: if it cannot be read.
      UnicodeDecodeError: if it is no UTF-8.
    """
    return epath.Path(file).read_bytes().decode("utf-8-sig")


@contextlib.contextmanager
def new_file(path: os.PathLike | str, *, overwrite: bool) -> Iterator[Path]:
    """A file that gets its name when it is complete, and is deleted if that fails.

    Raises:
      ValueError: if there is one already (that is not to be overwritten), or it cannot be
        written.
    """
    if os.fspath(path).endswith("/"):
        raise InputError(f"{path} is the name of a directory, and a file is to be written")
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        what = "it is a directory" if path.is_dir() else "--overwrite (overwrite=True) replaces it"
        raise InputError(f"{path} exists already; {what}")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        part.touch()  # tells before long work whether it can be
        yield part
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def replace_file(file: epath.Path, content: bytes) -> None:
    """Writes a file that is never there in part."""
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(content)
    part.replace(file)


def list_files(directory: epath.Path, parent: str = "") -> dict[str, epath.Path]:
    """Every file in a directory and below, by relative path."""
    files = {}
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            files |= list_files(path, f"{parent}{path.name}/")
        else:
            files[parent + path.name] = path
    return files


def checksum(file: epath.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with epath.Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
