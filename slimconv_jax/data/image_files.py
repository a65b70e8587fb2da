"""Decides which files are images: by name in directories, by content when they are read."""

import collections
import functools
import os
import warnings
from collections.abc import Collection, Iterator, Sequence

from etils import epath
from PIL import Image

from slimconv_jax.errors import LIBRARY_ERRORS, InputError, InputWarning
from slimconv_jax.files import is_address, locate, open_file

_FORMATS = frozenset(
    {
        *("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX"),
        *("PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
    }
)
"""The formats of Pillow that are read; some of the others run programs, such as Ghostscript."""


DAMAGE = (*LIBRARY_ERRORS, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""The errors that Pillow's decoders raise for damaged files."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Returns the formats that are read with the installed Pillow."""
    Image.init()
    return tuple(sorted(_FORMATS & Image.OPEN.keys()))


@functools.cache
def suffixes() -> frozenset[str]:
    """Returns the endings of the names of images, in lower case."""
    names = {*formats(), "MPO"}  # which is read as JPEG
    return frozenset(end for end, name in Image.registered_extensions().items() if name in names)


def list_images(directory: epath.PathLike, others: set[str] | None = None) -> list[str]:
    """Lists the image files in a directory and below it, sorted, each linked directory once.

    An image file has the ending of an image, or no ending and the content of one. Names that begin
    with a dot are ignored. The files are strings, since there may be millions.

    Args:
      directory: local, or an address such as gs://bucket/photos.
      others: a set to which the files that are left out are added.

    Raises:
      ValueError: if a directory cannot be read.
    """
    files = []
    for parent, names in _walk(os.fspath(directory)):
        for name in names:
            if name[0] == ".":
                continue
            file = os.path.join(parent, name)
            if is_image(file):
                files.append(file)
            elif others is not None:
                others.add(file)
    return sorted(files)


def is_image(file: str) -> bool:
    """Returns whether a file is an image by its name, or, if it has no ending, by its content."""
    end = os.path.splitext(file)[1].lower()
    return end in suffixes() or (not end and _begins_as_image(file))


def _begins_as_image(file: str) -> bool:
    try:
        with open_file(file) as stream:
            Image.open(stream, formats=formats()).close()
    except DAMAGE:
        return False
    return True


def _walk(directory: str) -> Iterator[tuple[str, Sequence[str]]]:
    """Yields each directory below that is not hidden, and the names of the files in it."""
    if is_address(directory):
        is_directory = {entry: entry.is_dir() for entry in epath.Path(directory).iterdir()}
        yield directory, [entry.name for entry, is_one in is_directory.items() if not is_one]
        for entry, is_one in is_directory.items():
            if is_one and entry.name[0] != ".":
                yield from _walk(os.fspath(entry))
        return

    def fail(error: OSError):
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None

    seen = set()
    for parent, directories, names in os.walk(directory, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        directories[:] = [] if real in seen else [d for d in directories if d[0] != "."]
        if real not in seen:
            seen.add(real)
            yield parent, names


def find_images(directory: epath.PathLike) -> list[str]:
    """Lists images as `list_images` does, and requires that there are some.

    Warns:
      UserWarning: if there are other files.

    Raises:
      ValueError: if there is no such directory, or there are no images in it.
    """
    if not locate(directory).is_dir():
        raise InputError(f"there is no directory {directory}")
    others = set()
    files = list_images(directory, others)
    if not files:
        raise InputError(f"there are no images ({', '.join(sorted(suffixes()))}) in {directory}")
    warn_of_others(others, directory)
    return files


def warn_of_others(others: Collection[str], directory: object) -> None:
    """Warns of files that were left out: how many there are, and how their names end."""
    if not others:
        return
    ends = collections.Counter(os.path.splitext(file)[1].lower() for file in others)
    kinds = [f"{count} {end or 'without an ending'}" for end, count in ends.most_common(8)]
    kinds += ["..."] if len(ends) > 8 else []
    which = "files in {} are left out, since their names do"
    if ends.total() == 1:
        which = "file in {} is left out, since its name does"
    warnings.warn(
        f"{ends.total()} {which.format(directory)} not end as those of images do: "
        f"{', '.join(kinds)}",
        InputWarning,
        stacklevel=2,
    )
