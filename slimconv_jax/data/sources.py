"""Where examples come from: random-access sources of images and labels."""

import dataclasses

import numpy as np
from PIL import Image

from slimconv_jax.errors import InputError

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Source:
    """A labelled set of images, decoded and in memory.

    Attributes:
      images: (N, H, W, 3), uint8.
      labels: (N,), int32, indices into `class_names`.
      class_names: the name of each class.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def digits(split: str) -> Source:
    """Scikit-learn's 1797 handwritten digits as 32x32 RGB; nothing is downloaded.

    The split is fixed and stratified: 1437 images to train on, 360 to test. The 8x8
    originals have 17 levels of grey; they are resized with Pillow's bilinear filter.
    """
    # Imported here since it takes over a second and only this source needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    indices = train_test_split(
        np.arange(len(data.target)), test_size=360, stratify=data.target, random_state=0
    )[SPLITS.index(split)]
    grey = np.round(data.images[indices] * (255 / 16)).astype(np.uint8)
    large = [
        np.asarray(Image.fromarray(g).resize((32, 32), Image.Resampling.BILINEAR)) for g in grey
    ]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    names = tuple(str(name) for name in data.target_names)
    return Source(images, data.target[indices].astype(np.int32), names)


SOURCES = {"digits": digits}


def load_source(name: str, split: str) -> Source:
    """One split of a named data set.

    Args:
      name: a key of `SOURCES`.
      split: "train" or "test".

    Raises:
      ValueError: if there is no such data set or split.
    """
    for what, value, allowed in (("data set", name, SOURCES), ("split", split, SPLITS)):
        if value not in allowed:
            raise InputError(f"unknown {what} {value!r}; there are: {', '.join(allowed)}")
    return SOURCES[name](split)
