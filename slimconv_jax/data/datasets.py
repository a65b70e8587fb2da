"""Loads data sets by name, and matches the classes of one with those of another.

To add a source, write its class in a file of its own and add it to `load_source` and `SOURCES`.
"""

import os
from collections.abc import Sequence

from slimconv_jax.data.sources import Example, ImageFolder, Source, Synthetic, digits
from slimconv_jax.data.tfds import TfdsSource
from slimconv_jax.data.transforms import MOST_SIDE
from slimconv_jax.errors import InputError, require_integer

SOURCES = ("digits", "tfds/NAME", "image_folder", "synthetic")


def load_source(
    name: str,
    split: str,
    *,
    data_dir: os.PathLike | str | None = None,
    num_examples: int = 1280,
    num_classes: int = 1000,
    image_size: int = 224,
) -> Source:
    """Loads one split of a data set.

    Args:
      name: "digits", "tfds/NAME", "image_folder" or "synthetic".
      split: "train", "test" or another split of the data set.
      data_dir: where the data are: for image_folder the directory of the splits, for tfds where
        TFDS stores its data sets (None for its default).
      num_examples: how many images; for "synthetic" only, like the last two.
      num_classes: how many classes.
      image_size: pixels a side.

    Raises:
      ValueError: if there is no such data set or split, or it cannot be used.
    """
    for what, value in (("name of a data set", name), ("name of a split", split)):
        if not isinstance(value, str):
            raise InputError(f"the {what} must be a string, not {value!r}")
    if not isinstance(data_dir, str | os.PathLike | None):
        raise InputError(f"data_dir must be a path, not {data_dir!r}")
    if name == "image_folder":
        if data_dir is None:
            raise InputError("the data set image_folder needs a data_dir, where its splits are")
        return ImageFolder(data_dir, split)
    if name.startswith("tfds/"):
        return TfdsSource(name.removeprefix("tfds/"), split, data_dir)
    if data_dir is not None and name in SOURCES:
        raise InputError(f"the data set {name} takes no data_dir, but was given {data_dir}")
    if name == "digits":
        return digits(split)
    if name == "synthetic":
        require_integer("synthetic: num_examples", num_examples, 1, 2**21)
        require_integer("synthetic: num_classes", num_classes, 1, 2**20)
        require_integer("synthetic: image_size", image_size, 1, MOST_SIDE)
        return Synthetic(num_examples, num_classes, image_size)
    raise InputError(f"unknown data set {name!r}; there are: {', '.join(SOURCES)}")


def load_splits(
    *, train_split: str = "train", test_split: str = "test", **options
) -> tuple[Source, Source]:
    """Loads the splits to train on and to test on, with the same classes.

    Args:
      train_split: name of the split to train on.
      test_split: name of the split to test on; its classes must be among those of the other.
      **options: the other arguments of `load_source`.

    Raises:
      ValueError: as in `load_source`, and if the test split has other classes.
    """
    train = load_source(split=train_split, **options)
    test = load_source(split=test_split, **options)
    return train, with_classes(test, train.class_names, of=f"the split {train_split!r}")


class _Relabelled:
    """A source whose labels index another list of classes."""

    def __init__(self, source: Source, labels: Sequence[int], class_names: Sequence[str]):
        self._source, self._labels, self.class_names = source, labels, tuple(class_names)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        image, label = self._source[index]
        return Example(image, self._labels[label])

    def describe(self, index: int) -> str:
        return self._source.describe(index)


def with_classes(source: Source, class_names: Sequence[str], *, of: str) -> Source:
    """Turns the labels of a source into indices into other `class_names`, matched by name.

    Args:
      source: a source whose classes should all be among `class_names`.
      class_names: the name of each class.
      of: the owner of these classes, for messages.

    Raises:
      ValueError: if the source has a class that is not among them.
    """
    class_names = tuple(class_names)
    if source.class_names == class_names:
        return source
    position = {name: label for label, name in enumerate(class_names)}
    strangers = [name for name in source.class_names if name not in position]
    if strangers:
        raise InputError(
            f"{len(strangers)} of the {len(source.class_names)} classes of the data, such as "
            f"{strangers[0]!r}, are not among the {len(class_names)} of {of}, such as "
            f"{class_names[0]!r}"
        )
    return _Relabelled(source, [position[name] for name in source.class_names], class_names)
