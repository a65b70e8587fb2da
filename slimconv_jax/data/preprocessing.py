"""Preprocessing for a model: images of one size, then normalised; the latter on the device."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slimconv_jax.data.transforms import CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD, are_numbers
from slimconv_jax.errors import InputError, require_number


def normalize(images: jax.Array, *, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Computes (x / 255 - mean) / std per channel; the options are the keys of `config.normalize`.

    Args:
      images: (N, H, W, 3), with values up to 255.
      mean: of red, green and blue, where 1 is the largest value.
      std: likewise.

    Returns:
      float32 of the same shape.

    Raises:
      ValueError: unless `mean` and `std` have three numbers each, those of `std` not near 0.
    """
    if not (are_numbers(mean, 3, 1e6) and are_numbers(std, 3, 1e6) and min(std) >= 1e-6):
        raise InputError(
            f"normalize: mean={mean!r} and std={std!r} must be three numbers each, one for each of "
            "red, green and blue, and those of std at least 1e-06"
        )
    mean, std = (
        jnp.asarray(c, jnp.float32).reshape((1,) * (images.ndim - 1) + (3,)) for c in (mean, std)
    )
    return (images.astype(jnp.float32) / 255 - mean) / std


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The preprocessing for a model; the defaults are those of the published models.

    Attributes:
      image_size: pixels a side; see `Transform`, also for the next.
      crop_ratio: the side of the central square over the image's shorter side.
      mean: of red, green and blue, where 1 is the largest value.
      std: likewise.
    """

    image_size: int | None = 224
    crop_ratio: float = CROP_RATIO
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self):
        require_number("crop_ratio", self.crop_ratio, least=0.1, most=1)

    def __str__(self) -> str:
        size = "images as they are"
        if self.image_size is not None:
            shorter = round(self.image_size / self.crop_ratio)
            size = f"shorter side to {shorter}, centre of {self.image_size} pixels"
        return f"{size}; mean {tuple(self.mean)}, std {tuple(self.std)}"


def preprocessing_of(info: dict[str, Any], **changes) -> Preprocessing:
    """Returns the preprocessing in the `info` of a saved model, with some changes.

    Raises:
      ValueError: if `info` has other fields there.
    """
    try:
        return Preprocessing(**{**info.get("preprocessing", {}), **changes})
    except TypeError:
        raise InputError("model.json is damaged: its preprocessing is not valid") from None
