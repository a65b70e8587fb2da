"""Small data sets on disk, written for a test."""

import io

import numpy as np
from PIL import Image


def encode(pixels, format="PNG", **options):
    """The bytes of an image file of pixels, (H, W, 3) or (H, W), uint8."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, format, **options)
    return stream.getvalue()


def smooth(height, width, seed=0):
    """A photo-like image: noise without the finest detail, (height, width, 3), uint8."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def write_folder(root, split, files):
    """`ROOT/SPLIT/CLASS/FILE` for each "CLASS/FILE" of a dict of bytes."""
    for name, data in files.items():
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tfds(root, splits, class_names=("cat", "dog", "owl"), features=None):
    """A data set "animals" that TFDS has prepared, without TensorFlow.

    `splits` has for each split a list of image bytes and labels.
    """
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Animals(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                image = tfds.features.Image(shape=(None, None, 3))
                label = tfds.features.ClassLabel(names=class_names)
                if features is None:
                    names, supervised = {"image": image, "label": label}, ("image", "label")
                else:
                    names, supervised = features(tfds), None
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(names),
                    supervised_keys=supervised,
                    disable_shuffling=True,
                )

            def _split_generators(self, download_manager):
                return {split: self._generate_examples(splits[split]) for split in splits}

            def _generate_examples(self, examples):
                for index, example in enumerate(examples):
                    if features is None:
                        example = dict(zip(("image", "label"), example, strict=True))
                    yield index, example

    Animals(data_dir=root, file_format="array_record").download_and_prepare()
    return root
