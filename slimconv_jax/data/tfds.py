"""Reads data sets of TensorFlow Datasets as a source, without TensorFlow."""

import contextlib
import os
import re
import threading
import types
from collections.abc import Iterator

from slimconv_jax.data.sources import Example, check_split, existing_directory
from slimconv_jax.errors import LIBRARY_ERRORS, InputError


class TfdsSource:
    """A data set that TensorFlow Datasets has prepared, read without TensorFlow.

    The files of a data set cannot run code: only TFDS's own kinds of features are allowed, and only
    the image and the label of a record are decoded.

    Args:
      name: as in TFDS: NAME, NAME/CONFIG, NAME:VERSION.
      split: "train", "validation", or another split of the data set; also "train[:1000]" and
        "train+test".
      data_dir: where TFDS stores its data sets; None for its default, `~/tensorflow_datasets` or
        `$TFDS_DATA_DIR`.

    Raises:
      ValueError: if there is no such data set or split, if it is not prepared in a format with
        random access (array_record), or if it does not consist of images with one class each.
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
        except _tfds_errors() as error:  # some messages end in a list of all data sets
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
            check_split(self._name, part.split("[")[0].strip(), splits)
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
        """Returns the names of the features that are the image and the label."""
        features = info.features
        image, label = info.supervised_keys or ("image", "label")
        with contextlib.suppress(KeyError, TypeError):
            is_image = isinstance(features[image], tfds.features.Image)
            if is_image and isinstance(features[label], tfds.features.ClassLabel):
                return image, label
        there = [f"{key} ({type(feature).__name__})" for key, feature in sorted(features.items())]
        raise InputError(
            f"{self._name} is not an image classification data set: its features are "
            f"{', '.join(there)}"
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
"""Excludes namespaces of others' code, and arguments, for which TFDS also runs code."""

_tfds_lock = threading.Lock()


@contextlib.contextmanager
def _features_of_tfds_alone(tfds: types.ModuleType) -> Iterator[None]:
    """Keeps TFDS from importing the modules that a data set's features.json names."""
    connector = tfds.features.FeatureConnector
    original = connector.__dict__["cls_from_name"]

    def class_of_tfds(cls, name: str) -> type:
        if not name.startswith("tensorflow_datasets."):
            raise InputError(
                f"its features.json names the class {name!r}, whose module is not imported; only "
                "classes of tensorflow_datasets are allowed"
            )
        return original.__get__(None, cls)(name)

    with _tfds_lock:
        connector.cls_from_name = classmethod(class_of_tfds)
        try:
            yield
        finally:
            connector.cls_from_name = original


def _tfds_errors() -> tuple[type[Exception], ...]:
    """Returns the errors that TFDS raises for damaged or unknown data sets."""
    from google.protobuf import json_format, message

    return (*LIBRARY_ERRORS, json_format.Error, message.Error)


_TFDS_TOOLS = "pip install tensorflow apache-beam mlcroissant"
