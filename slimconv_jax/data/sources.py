"""Where examples come from: random-access sources of labelled images, mostly still encoded.

A source has a length and `class_names`; `source[i]` is an `Example`, and `source.describe(i)`
says in an error message which one that is.
"""

import contextlib
import os
import re
import threading
import types
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from etils import epath
from PIL import Image

from slimconv_jax.data.digits import read_digits
from slimconv_jax.data.image_files import list_images, suffixes, warn_of_others
from slimconv_jax.data.transforms import MOST_IMAGE_BYTES, MOST_SIDE, ImageError
from slimconv_jax.errors import LIBRARY_ERRORS, InputError, require_integer
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
    """What every source offers; see the module's docstring."""

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
      name: what the images are called in messages.
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
    """The digits of `read_digits` as 32x32 RGB, resized with Pillow's bilinear filter."""
    _check_split("digits", split, ("train", "test"))
    pixels, labels, is_test = read_digits()
    chosen = is_test == (split == "test")
    grey = np.round(pixels[chosen] * (255 / 16)).astype(np.uint8)
    large = [
        np.asarray(Image.fromarray(g).resize((32, 32), Image.Resampling.BILINEAR)) for g in grey
    ]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    return ArraySource(images, labels[chosen], map(str, range(10)), "digits")


class TfdsSource:
    """A data set that TensorFlow Datasets has prepared, read without TensorFlow.

    Its files run no code: a data set may have TFDS's own kinds of features only, and of its records
    nothing is decoded but the image and the label.

    Args:
      name: as TFDS has it: NAME, NAME/CONFIG, NAME:VERSION.
      split: "train", "validation", or whatever the data set has; also "train[:1000]" and
        "train+test".
      data_dir: where TFDS keeps its data sets; None for its default, `~/tensorflow_datasets` or
        `$TFDS_DATA_DIR`.

    Raises:
      ValueError: if there is no such data set or split, it is not prepared in a format with
        random access (array_record), or is not one of images, each with one class.
    """

    def __init__(self, name: str, split: str, data_dir: os.PathLike | str | None = None):
        # Imported here since it takes a second.
        import tensorflow_datasets as tfds

        if not _TFDS_NAME.fullmatch(name):
            raise InputError(
                f"TFDS has no data set {name!r}: the name must be NAME, NAME/CONFIG or, with a "
                "version, NAME:1.0.0 or NAME/CONFIG:1.0.0"
            )
        if data_dir is not None:
            data_dir = existing_directory(data_dir)
        try:
            with _features_of_tfds_alone(tfds):
                builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
        except _tfds_errors() as error:  # some of which end in a list of all data sets
            reason = str(error).strip().splitlines()[0]
            where = f" in {data_dir}" if data_dir else ""
            raise InputError(f"TFDS has no data set {name!r}{where}: {reason}") from None
        self._name, self._split = f"tfds/{name}", split
        splits = builder.info.splits
        if not splits:
            root = str(builder.data_dir).removesuffix(f"/{builder.info.full_name}")
            raise InputError(
                f"the data set tfds/{name} is not prepared in {root}; to prepare it, in any "
                f"environment: {_TFDS_TOOLS} && tfds build {name} --file_format=array_record "
                f"--data_dir={root}"
            )
        for part in split.split("+"):
            _check_split(self._name, part.split("[")[0].strip(), splits)
        image, label = self._keys(tfds, builder.info)
        features = builder.info.features
        self._features = tfds.features.FeaturesDict({k: features[k] for k in (image, label)})
        self._decoders = {image: tfds.decode.SkipDecoding()}
        self._image_key, self._label_key = image, label
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        try:
            self._records = builder.as_data_source(split, deserialize_method=raw)
        except NotImplementedError:  # TFDS's answer to a format without random access
            raise InputError(
                f"the data set in {builder.data_dir} is in the format "
                f"{builder.info.file_format.value}, which has no random access; to convert "
                f"it, in any environment: {_TFDS_TOOLS} && tfds convert_format "
                f"--dataset_version_dir={builder.data_dir} --out_file_format=array_record"
            ) from None
        except _tfds_errors() as error:  # a missing or damaged file, a wrong or empty slice
            reason = " ".join(str(error).split())
            raise InputError(f"cannot read {split!r} of {builder.data_dir}: {reason}") from None
        self.class_names = tuple(features[label].names)

    def _keys(self, tfds, info) -> tuple[str, str]:
        """Which features are the image and the label."""
        features = info.features
        image, label = info.supervised_keys or ("image", "label")
        try:
            if isinstance(features[image], tfds.features.Image) and isinstance(
                features[label], tfds.features.ClassLabel
            ):
                return image, label
        except (KeyError, TypeError):
            pass
        raise InputError(
            f"{self._name} is not an image classification data set: its features are "
            + ", ".join(
                f"{key} ({type(feature).__name__})" for key, feature in sorted(features.items())
            )
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._features.deserialize_example_np(
                self._records[index], decoders=self._decoders
            )
        except _tfds_errors() as error:
            raise InputError(f"cannot read {self.describe(index)}: {error}") from None
        label = int(record[self._label_key])
        if not 0 <= label < len(self.class_names):
            raise InputError(
                f"{self.describe(index)} has the label {label}; labels must be 0 to "
                f"{len(self.class_names) - 1} (some data sets have test splits without labels)"
            )
        return Example(record[self._image_key], label)

    def describe(self, index: int) -> str:
        return f"record {index} of {self._name}, split {self._split!r}"


_TFDS_NAME = re.compile(r"\w+(/[^/\\,:=]+)?(:[\d.*]+)?")
"""Without the namespaces of others' code, and without arguments, for which TFDS runs code too."""

_tfds_lock = threading.Lock()


@contextlib.contextmanager
def _features_of_tfds_alone(tfds: types.ModuleType) -> Iterator[None]:
    """Keeps TFDS from importing the modules that a data set's features.json names."""
    connector = tfds.features.FeatureConnector
    original = connector.__dict__["cls_from_name"]

    def class_of_tfds(cls, name: str) -> type:
        if not name.startswith("tensorflow_datasets."):
            raise InputError(
                f"its features.json names the class {name!r}, whose module is not imported; the "
                "classes of tensorflow_datasets alone are"
            )
        return original.__get__(None, cls)(name)

    with _tfds_lock:
        connector.cls_from_name = classmethod(class_of_tfds)
        try:
            yield
        finally:
            connector.cls_from_name = original


def _tfds_errors() -> tuple[type[Exception], ...]:
    """What TFDS raises for damaged or unknown data sets."""
    from google.protobuf import json_format, message

    return (*LIBRARY_ERRORS, json_format.Error, message.Error)


_TFDS_TOOLS = "pip install tensorflow apache-beam mlcroissant"


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

    Files are those whose names end as images do, also in directories below that of the class;
    what begins with a dot is ignored.

    Args:
      root: the directory of the splits, local or in an object store (gs://...).
      split: "train", "val", or whatever is there.

    Warns:
      UserWarning: if there are other files, with their number and endings.

    Raises:
      ValueError: if there is no such directory, or no class, or no image in a class.
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
    """A directory of data, local or in an object store.

    Raises:
      ValueError: if there is none, or what reads the object store is not installed.
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
    """Random noise with labels in turn, for benchmarks: what it costs to train, without data.

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
    """One split of a data set.

    Args:
      name: "digits", "tfds/NAME", "image_folder" or "synthetic".
      split: "train", "test" or whatever the data set has.
      data_dir: where the data are: for image_folder the directory of the splits, for tfds where
        TFDS keeps its data sets (None for its default).
      num_examples: of "synthetic" only, as the last two.
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
        sizes = {"num_examples": num_examples, "num_classes": num_classes, "image_size": image_size}
        for key, value in sizes.items():
            most = MOST_SIDE if key == "image_size" else 2**21 if key == "num_examples" else 2**20
            require_integer(f"synthetic: {key}", value, 1, most)
        return Synthetic(**sizes)
    raise InputError(f"unknown data set {name!r}; there are: {', '.join(SOURCES)}")


def load_splits(
    *, train_split: str = "train", test_split: str = "test", **options
) -> tuple[Source, Source]:
    """What to train on and what to test on, with the same classes.

    Args:
      train_split: name of the split to train on.
      test_split: name of the split to test on; its classes must be among those of the other.
      **options: the other arguments of `load_source`.

    Raises:
      ValueError: as `load_source`, and if the test split has other classes.
    """
    train = load_source(split=train_split, **options)
    test = load_source(split=test_split, **options)
    return train, with_classes(test, train.class_names, of=f"the split {train_split!r}")


def _check_split(name: str, split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise InputError(f"{name} has no split {split!r}; there are: {', '.join(splits)}")


class _Relabelled:
    """A source with the labels of another list of classes."""

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
    """A source with its labels as indices into other `class_names`, matched by name.

    Args:
      source: some or all of whose classes are among `class_names`.
      class_names: the name of each class.
      of: whose classes these are, for messages.

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
