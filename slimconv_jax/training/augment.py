"""What happens to images on the device, inside the step: crop, flip, then normalise."""

import math
from collections.abc import Sequence
from numbers import Real

import jax
import jax.numpy as jnp

from slimconv_jax.errors import InputError, require_integer


def normalize(images: jax.Array, *, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(x / 255 - mean) / std, per channel: (N, H, W, 3) uint8 to float32.

    Raises:
      ValueError: unless `mean` and `std` have three numbers each, those of `std` positive.
    """
    if not (_three_numbers(mean) and _three_numbers(std) and min(std) > 0):
        raise InputError(
            f"normalize: mean={mean!r} and std={std!r} must be three numbers each, one for each of "
            "red, green and blue, and those of std positive"
        )
    return (images / jnp.float32(255) - jnp.asarray(mean)) / jnp.asarray(std)


def _three_numbers(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 3
        and all(isinstance(number, Real) and math.isfinite(number) for number in value)
    )


def random_crop(key: jax.Array, images: jax.Array, *, padding: int) -> jax.Array:
    """Moves each image by up to `padding` pixels in each direction, filling up with zeros.

    Args:
      key: source of the random offsets, one pair for each image.
      images: (N, H, W, C).
      padding: pixels added on each side before an H x W crop is taken, 0 for none.

    Raises:
      ValueError: if the padding is no integer >= 0.
    """
    require_integer("augment: crop_padding", padding, 0)
    if padding == 0:
        return images
    pad = (padding, padding)
    padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)

    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (*offset, 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image, left to right, with probability 1/2: (N, H, W, C)."""
    flipped = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def augment(
    key: jax.Array, images: jax.Array, *, crop_padding: int = 0, flip: bool = False
) -> jax.Array:
    """The random changes of a training batch; its options are the keys of `config.augment`.

    Args:
      key: source of all randomness.
      images: (N, H, W, 3) uint8; so is the result.
      crop_padding: see `random_crop`.
      flip: whether to mirror every other image; see `random_flip`.

    Raises:
      ValueError: if an option is wrong.
    """
    if not isinstance(flip, bool):
        raise InputError(f"augment: flip={flip!r} must be True or False")
    crop_key, flip_key = jax.random.split(key)
    images = random_crop(crop_key, images, padding=crop_padding)
    return random_flip(flip_key, images) if flip else images
