"""The sources of examples: labelled images with random access, mostly still encoded.

A source has a length and `class_names`; `source[i]` is an `Example`, and `source.describe(i)`
names it in error messages.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from etils import epath
from PIL import Image

from slimconv_jax.data.digits import read_digits
from slimconv_jax.data.image_files import list_images, suffixes, warn_of_others
from slimconv_jax.data.transforms import MOST_IMAGE_BYTES, ImageError
from slimconv_jax.errors import InputError
from slimconv_jax.files import locate, read_bytes


class Example(NamedTuple):
    """One labelled image.

    Attributes:
      image: the bytes of an image file, or decoded pixels: (H, W, 3), uint8.
      label: an index into `class_names`.
    """

    image: bytes | np.ndarray
    label: int


class Source(Protocol):
    """The interface of every source; see the module's docstring."""

    class_names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def describe(self, index: int) -> str: ...


class ArraySource:
    """Decoded images in memory.

    Args:
      images: (N, H, W, 3), uint8.
      labels: (N,), indices into `class_names`.
      class_names: the name of each class.
      name: of the images, for messages.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], name: str
    ):
        self._images, self._labels, self._name = images, labels, name
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]))

    def describe(self, index: int) -> str:
        return f"image {index} of {self._name}"


def digits(split: str) -> ArraySource:
    """Returns the digits of `read_digits` as 32x32 RGB, resized with Pillow's bilinear filter."""
    check_split("digits", split, ("train", "test"))
    pixels, labels, is_test = read_digits()
    chosen = is_test == (split == "test")
    grey = map(Image.fromarray, np.round(pixels[chosen] * (255 / 16)).astype(np.uint8))
    large = np.stack([image.resize((32, 32), Image.Resampling.BILINEAR) for image in grey])
    images = np.repeat(large[..., None], 3, axis=-1)
    return ArraySource(images, labels[chosen], map(str, range(10)), "digits")


class ImageFiles:
    """Image files, read as they are needed.

    Args:
      files: their paths.
      labels: the class of each, indices into `class_names`; None for files without classes.
      class_names: the name of each class.
    """

    def __init__(
        self,
        files: Sequence[str],
        labels: Sequence[int] | None = None,
        class_names: Sequence[str] = (),
    ):
        self._files = files
        self._labels = [-1] * len(files) if labels is None else labels
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        try:
            return Example(read_bytes(self._files[index], MOST_IMAGE_BYTES), self._labels[index])
        except OSError as error:
            raise ImageError(f"cannot read {self._files[index]}: {error.strerror}") from None

    def describe(self, index: int) -> str:
        return os.fsencode(self._files[index]).decode(errors="backslashreplace")


class ImageFolder(ImageFiles):
    """Image files in one directory per class, `ROOT/SPLIT/CLASS/*`; classes sorted by name.

    The files of a class are those that `list_images` finds in its directory and below.

    Args:
      root: the directory of the splits, local or in an object store (gs://...).
      split: "train", "val", or another directory of `root`.

    Warns:
      UserWarning: if there are other files, with their number and endings.

    Raises:
      ValueError: if there is no such directory, if it has no classes, or if a class has no images.
    """

    def __init__(self, root: os.PathLike | str, split: str):
        root = existing_directory(root)
        splits = _directories(root)
        directory = root / split
        if not directory.is_dir():
            raise InputError(
                f"there is no directory {directory}; {root} has: {', '.join(splits) or 'none'}"
            )
        class_names = _directories(directory)
        if not class_names:
            raise InputError(f"{directory} has no directories, one for each class, with images")
        all_files, labels, others = [], [], set()
        for label, name in enumerate(class_names):
            files = list_images(directory / name, others)
            if not files:
                ends = ", ".join(sorted(suffixes()))
                raise InputError(f"the class {directory / name} has no images ({ends})")
            all_files += files
            labels += [label] * len(files)
        warn_of_others(others, directory)
        super().__init__(all_files, labels, class_names)


def existing_directory(path: epath.PathLike) -> epath.Path:
    """Returns the path of a directory of data, local or in an object store.

    Raises:
      ValueError: if there is no such directory, or no package that reads the object store.
    """
    path = locate(path)
    try:
        is_there = path.is_dir()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if not is_there:
        raise InputError(f"there is no directory {path}")
    return path


def _directories(directory: epath.Path) -> list[str]:
    try:
        return sorted(p.name for p in directory.iterdir() if p.is_dir() and p.name[0] != ".")
    except OSError as error:
        raise InputError(f"cannot read {directory}: {error.strerror}") from None


class Synthetic:
    """Random noise with labels in turn, to measure the cost of training without data.

    Args:
      num_examples: how many images there are.
      num_classes: how many classes.
      image_size: pixels a side.
    """

    def __init__(self, num_examples: int, num_classes: int, image_size: int):
        self._num_examples, self._image_size = num_examples, image_size
        self.class_names = tuple(map(str, range(num_classes)))

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: int) -> Example:
        shape = (self._image_size, self._image_size, 3)
        image = np.random.default_rng(index).bytes(np.prod(shape))
        return Example(np.frombuffer(image, np.uint8).reshape(shape), index % len(self.class_names))

    def describe(self, index: int) -> str:
        return f"image {index} of synthetic"


def check_split(name: str, split: str, splits: Sequence[str]) -> None:
    """Checks that a data set has a split.

    Raises:
      ValueError: if it does not; the message lists the splits that it has.
    """
    if split not in splits:
        raise InputError(f"{name} has no split {split!r}; there are: {', '.join(splits)}")
