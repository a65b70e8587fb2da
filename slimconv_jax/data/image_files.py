"""Which files are images: by their names in directories, by their bytes when they are read."""

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
"""The formats of Pillow that are read. Of the others some run programs, such as Ghostscript."""


DAMAGE = (*LIBRARY_ERRORS, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What Pillow's decoders raise for damaged files."""


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are read with the Pillow that is installed."""
    Image.init()
    return tuple(sorted(_FORMATS & Image.OPEN.keys()))


@functools.cache
def suffixes() -> frozenset[str]:
    """How the names of images end, in lower case."""
    names = {*formats(), "MPO"}  # which is read as JPEG
    return frozenset(end for end, name in Image.registered_extensions().items() if name in names)


def list_images(directory: epath.PathLike, others: set[str] | None = None) -> list[str]:
    """The image files in a directory and all those below it, sorted; of links too, but once.

    Those are files whose names end as images do, and those without an ending that are images. What
    begins with a dot is ignored. Strings, since there may be millions.

    Args:
      directory: local, or an address such as gs://bucket/photos.
      others: gets the files that are left out.

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
    """Whether a file is an image by its name, or, if that has no ending, by its content."""
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
    """Each directory below, but hidden ones, and the names of the files in it."""
    if is_address(directory):
        entries = list(epath.Path(directory).iterdir())
        is_directory = [entry.is_dir() for entry in entries]
        yield (
            directory,
            [e.name for e, is_one in zip(entries, is_directory, strict=True) if not is_one],
        )
        for entry, is_one in zip(entries, is_directory, strict=True):
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
    """The files of `list_images`, of which there must be some.

    Warns:
      UserWarning: if there are other files.

    Raises:
      ValueError: if there is no such directory, or no image in it.
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
    """Tells how many files were left out, and how their names end."""
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
