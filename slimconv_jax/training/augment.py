"""Augments training images on the device, inside the step: crops, flips, policies, mixes."""

import functools

import jax
import jax.numpy as jnp

from slimconv_jax.errors import InputError, require_integer, require_number
from slimconv_jax.training.policies import randaugment, trivialaugment


def random_crop(key: jax.Array, images: jax.Array, *, padding: int) -> jax.Array:
    """Shifts each image by up to `padding` pixels in each direction, filling up with zeros.

    Args:
      key: source of the random offsets, one pair for each image.
      images: (N, H, W, C).
      padding: pixels added on each side before an H x W crop is taken, 0 for none.

    Raises:
      ValueError: if the padding is not an integer from 0 to the shorter side.
    """
    require_integer("augment: crop_padding", padding, 0, min(images.shape[1:3]))
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


def random_erase(key: jax.Array, images: jax.Array, *, probability: float) -> jax.Array:
    """Replaces a rectangle of some images with random pixels (Zhong et al., AAAI 2020).

    Args:
      key: source of the rectangles, one for each image: of 2 % to a third of its area, 0.3 to 3.3
        times as high as wide; the first of ten that lies within the image, or none.
      images: (N, H, W, C) uint8.
      probability: with which an image gets one.
    """
    height, width = images.shape[1:3]
    keys = jax.random.split(key, 6)
    tries = (len(images), 10)
    area = jax.random.uniform(keys[0], tries, minval=0.02, maxval=1 / 3) * height * width
    aspect = jnp.exp(jax.random.uniform(keys[1], tries, minval=-1, maxval=1) * jnp.log(1 / 0.3))
    sides = jnp.round(jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], -1))
    fits = (sides < jnp.array([height, width])).all(-1)
    side = jnp.take_along_axis(sides, fits.argmax(1)[:, None, None], axis=1)[:, 0]
    chosen = jax.random.bernoulli(keys[2], float(probability), (len(images),)) & fits.any(1)
    space = jnp.array([height, width]) - side + 1
    corner = jnp.floor(jax.random.uniform(keys[3], side.shape) * space)

    def within(axis: int, length: int) -> jax.Array:
        start, end = corner[:, axis, None], (corner + side)[:, axis, None]
        return (jnp.arange(length) >= start) & (jnp.arange(length) < end)

    erased = chosen[:, None, None] & within(0, height)[:, :, None] & within(1, width)[:, None]
    # Each image sees a part of the same noise, since to draw some for each takes 25 times as long.
    noise = jax.random.bits(keys[4], (2 * height, *images.shape[2:]), jnp.uint8)
    starts = jax.random.randint(keys[5], (len(images),), 0, height + 1)
    noise = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(noise, start, height))(starts)
    return jnp.where(erased[..., None], noise, images)


def mixup(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Blends each image with the one before it in the batch (Zhang et al., ICLR 2018).

    Args:
      key: source of the one share of the batch, from Beta(alpha, alpha).
      images: (N, H, W, C).
      targets: (N, classes) probabilities.
      alpha: above 0.

    Returns:
      The blends, float32: share * x + (1 - share) * the one before, of images and of targets.
    """
    share = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
    images = images.astype(jnp.float32)
    return _blend(share, images), _blend(share, targets)


def cutmix(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Pastes a rectangle of the image before it into each image (Yun et al., ICCV 2019).

    Args:
      key: source of the rectangle, the same for the batch: its centre is uniform, its share of
        the area from Beta(alpha, alpha), less what lies beyond the border.
      images: (N, H, W, C).
      targets: (N, classes) probabilities.
      alpha: above 0.

    Returns:
      Images of the same dtype, and targets blended by the areas.
    """
    height, width = images.shape[1:3]
    share_key, row_key, column_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32))

    def within(key: jax.Array, length: int) -> jax.Array:
        centre = jax.random.randint(key, (), 0, length)
        half = (side * length / 2).astype(jnp.int32)
        positions = jnp.arange(length)
        return (positions >= centre - half) & (positions < centre + half)

    pasted = within(row_key, height)[:, None] & within(column_key, width)[None, :]
    mixed = jnp.where(pasted[None, ..., None], jnp.roll(images, 1, axis=0), images)
    return mixed, _blend(1 - pasted.mean(dtype=jnp.float32), targets)


def _blend(share: jax.Array, x: jax.Array) -> jax.Array:
    return share * x + (1 - share) * jnp.roll(x, 1, axis=0)


def augment(
    key: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    crop_padding: int = 0,
    flip: bool = False,
    randaugment_layers: int = 0,
    randaugment_magnitude: float = 9.0,
    randaugment_std: float = 0.5,
    trivialaugment_wide: bool = False,
    erase_probability: float = 0.0,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Augments a training batch at random; its options are the keys of `config.augment`.

    Args:
      key: source of all randomness.
      images: (N, H, W, 3) uint8.
      targets: (N, classes) probabilities.
      crop_padding: the most pixels by which an image moves in each direction; 0 for none.
      flip: whether to mirror every image, left to right, with probability 1/2.
      randaugment_layers: random operations that an image goes through; 0 for no RandAugment. Here
        and below, see `slimconv_jax.training.policies`.
      randaugment_magnitude: their mean strength, up to 10.
      randaugment_std: the standard deviation of their strength.
      trivialaugment_wide: whether each image goes through one operation of TrivialAugment.
      erase_probability: with which a rectangle of an image becomes random pixels.
      mixup_alpha: images are blended with shares from Beta(alpha, alpha); 0 for none.
      cutmix_alpha: rectangles are pasted with areas from Beta(alpha, alpha); 0 for none. With both,
        each batch gets one or the other.

    Returns:
      Images, uint8 or float32 with the same range, and targets.

    Raises:
      ValueError: if an option is invalid.
    """
    for name, value in (("flip", flip), ("trivialaugment_wide", trivialaugment_wide)):
        if not isinstance(value, bool):
            raise InputError(f"augment: {name}={value!r} must be True or False")
    require_integer("augment: randaugment_layers", randaugment_layers, 0, 16)
    require_number("augment: randaugment_magnitude", randaugment_magnitude, least=0, most=10)
    require_number("augment: randaugment_std", randaugment_std, least=0)
    require_number("augment: erase_probability", erase_probability, least=0, most=1)
    if randaugment_layers and trivialaugment_wide:
        raise InputError("augment: randaugment_layers and trivialaugment_wide exclude each other")
    for name, value in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        require_number(f"augment: {name}", value, least=0)
    keys = jax.random.split(key, 6)  # to append another leaves these as they are
    crop_key, flip_key, choice_key, mix_key, policy_key, erase_key = keys
    images = random_crop(crop_key, images, padding=crop_padding)
    if flip:
        images = random_flip(flip_key, images)
    if randaugment_layers:
        images = randaugment(
            policy_key,
            images,
            layers=randaugment_layers,
            magnitude=randaugment_magnitude,
            std=randaugment_std,
        )
    if trivialaugment_wide:
        images = trivialaugment(policy_key, images)
    if erase_probability:
        images = random_erase(erase_key, images, probability=erase_probability)
    mixes = [
        functools.partial(mix, mix_key, alpha=alpha)
        for mix, alpha in ((mixup, mixup_alpha), (cutmix, cutmix_alpha))
        if alpha
    ]
    if not mixes:
        return images, targets
    if len(mixes) == 2:
        images = images.astype(jnp.float32)  # so that both branches agree
    return jax.lax.switch(jax.random.randint(choice_key, (), 0, len(mixes)), mixes, images, targets)
