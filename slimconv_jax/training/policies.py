"""Augments images by policies of operations, on the device: RandAugment and TrivialAugment.

An operation maps an image, (H, W, 3) uint8, and a number to an image, in the arithmetic of Pillow.
To add one, write its function, and a row in the table of a policy.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Operation = Callable[[jax.Array, jax.Array], jax.Array]

SLOTS = 16
"""The most parts of a batch that have operations of their own."""


def _blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """Goes from a degenerate image (factor 0) over the image (1) beyond it, as `Image.blend`.

    The factor becomes a multiple of 2**-12, with which float32 is exact, whatever a device fuses.
    """
    degenerate = degenerate.astype(jnp.float32)
    factor = jnp.round(factor * 2**12) / 2**12
    mixed = degenerate + factor * (image.astype(jnp.float32) - degenerate)
    return jnp.clip(mixed, 0, 255).astype(jnp.uint8)


def _grey(image: jax.Array) -> jax.Array:
    """Converts to luma, (H, W, 1), in Pillow's integers."""
    weights = jnp.array([19595, 38470, 7471], jnp.int32)
    return (jnp.sum(image.astype(jnp.int32) * weights, -1, keepdims=True) + 2**15) >> 16


def brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    return _blend(jnp.zeros_like(image), image, factor)


def color(image: jax.Array, factor: jax.Array) -> jax.Array:
    return _blend(_grey(image), image, factor)


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    grey = _grey(image)
    return _blend((grey.sum() + grey.size // 2) // grey.size, image, factor)


def sharpness(image: jax.Array, factor: jax.Array) -> jax.Array:
    x = image.astype(jnp.int32)
    rows = x[:-2] + x[1:-1] + x[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * x[1:-1, 1:-1]
    smooth = x.at[1:-1, 1:-1].set((total + 6) // 13)  # the border stays
    return _blend(smooth, image, factor)


def invert(image: jax.Array, _: jax.Array) -> jax.Array:
    return 255 - image


def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
    """Keeps the highest bits of every value."""
    return image & ~((1 << (8 - bits.astype(jnp.int32))) - 1).astype(jnp.uint8)


def solarize(image: jax.Array, threshold: jax.Array) -> jax.Array:
    """Inverts the values from a threshold on."""
    return jnp.where(image < threshold, image, 255 - image)


def solarize_add(image: jax.Array, addend: jax.Array) -> jax.Array:
    """Adds to the values below 128."""
    brighter = jnp.minimum(image + addend.astype(jnp.int32), 255).astype(jnp.uint8)
    return jnp.where(image < 128, brighter, image)


def autocontrast(image: jax.Array, _: jax.Array) -> jax.Array:
    """Stretches each channel to the whole range."""
    low, high = (f(image, axis=(0, 1)).astype(jnp.int32) for f in (jnp.min, jnp.max))
    stretched = (image - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, image).astype(jnp.uint8)


def equalize(image: jax.Array, _: jax.Array) -> jax.Array:
    """Spreads the values of each channel evenly over the range."""

    def equalize_channel(channel):
        histogram = jnp.bincount(channel.reshape(-1), length=256)
        step = (channel.size - histogram[channel.max()]) // 255
        before = jnp.cumulative_sum(histogram, include_initial=True)[:-1]
        table = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table.astype(jnp.uint8)[channel], channel)

    return jax.vmap(equalize_channel, -1, -1)(image)


def _affine(image: jax.Array, a, b, c, d, e, f) -> jax.Array:
    """Takes the pixel (x, y) from (ax + by + c, dx + ey + f); black from outside.

    Coordinates are those of centres of pixels; the nearest pixel is taken. As in Pillow, all are
    multiples of 2**-16.
    """
    height, width, _ = image.shape
    (a, b, d, e), (c, f) = (
        [jnp.floor(jnp.asarray(v) * 2.0**16 + 0.5).astype(jnp.int32) for v in values]
        for values in ((a, b, d, e), (c + (a + b) / 2, f + (d + e) / 2))
    )
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return jnp.where(inside[..., None], image.at[row, column].get(mode="clip"), jnp.uint8(0))


def shear_x(image: jax.Array, factor: jax.Array) -> jax.Array:
    return _affine(image, 1, factor, 0, 0, 1, 0)


def shear_y(image: jax.Array, factor: jax.Array) -> jax.Array:
    return _affine(image, 1, 0, 0, factor, 1, 0)


def _translate(image: jax.Array, pixels: jax.Array, axis: int) -> jax.Array:
    """Does what `_affine` would do, in a fifth of the time on TPUs (by their compiler)."""
    length = image.shape[axis]
    shift = jnp.clip(jnp.floor(pixels + 0.5).astype(jnp.int32), -length, length)
    padded = jnp.pad(image, [(length * (i == axis),) * 2 for i in range(3)])
    return jax.lax.dynamic_slice_in_dim(padded, length + shift, length, axis)


def translate_x(image: jax.Array, pixels: jax.Array) -> jax.Array:
    return _translate(image, pixels, 1)


def translate_y(image: jax.Array, pixels: jax.Array) -> jax.Array:
    return _translate(image, pixels, 0)


def rotate(image: jax.Array, degrees: jax.Array) -> jax.Array:
    """Turns counter-clockwise about the centre."""
    radians = jnp.deg2rad(degrees)
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    y, x = (length / 2 for length in image.shape[:2])
    return _affine(image, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _signed(most: float) -> Callable:
    return lambda strength, sign: most * strength * sign


def _factor(most: float) -> Callable:
    return lambda strength, sign: 1 + most * strength * sign


def _nothing(strength: jax.Array, sign: jax.Array) -> jax.Array:
    return strength


RANDAUGMENT: dict[str, tuple[Operation, Callable]] = {
    "autocontrast": (autocontrast, _nothing),
    "equalize": (equalize, _nothing),
    "invert": (invert, _nothing),
    "rotate": (rotate, _signed(30)),
    "posterize": (posterize, lambda strength, _: jnp.maximum(4 - jnp.floor(4 * strength), 1)),
    "solarize": (solarize, lambda strength, _: 256 - jnp.floor(256 * strength)),
    "solarize_add": (solarize_add, lambda strength, _: jnp.floor(110 * strength)),
    "color": (color, _factor(0.9)),
    "contrast": (contrast, _factor(0.9)),
    "brightness": (brightness, _factor(0.9)),
    "sharpness": (sharpness, _factor(0.9)),
    "shear_x": (shear_x, _signed(0.3)),
    "shear_y": (shear_y, _signed(0.3)),
    "translate_x": (lambda image, share: translate_x(image, share * image.shape[1]), _signed(0.45)),
    "translate_y": (lambda image, share: translate_y(image, share * image.shape[0]), _signed(0.45)),
}
"""For each operation, its function, and its number by the strength, 0 to 1, and the sign, -1 or 1.

These are timm's, of "rand" with "inc1": what is stronger changes more.
"""

TRIVIALAUGMENT: dict[str, tuple[Operation, Callable]] = {
    "identity": (lambda image, _: image, _nothing),
    "autocontrast": (autocontrast, _nothing),
    "equalize": (equalize, _nothing),
    "rotate": (rotate, _signed(135)),
    "posterize": (posterize, lambda strength, _: 8 - jnp.round(6 * strength)),
    "solarize": (solarize, lambda strength, _: 255 * (1 - strength)),
    "color": (color, _factor(0.99)),
    "contrast": (contrast, _factor(0.99)),
    "brightness": (brightness, _factor(0.99)),
    "sharpness": (sharpness, _factor(0.99)),
    "shear_x": (shear_x, _signed(0.99)),
    "shear_y": (shear_y, _signed(0.99)),
    "translate_x": (translate_x, _signed(32)),
    "translate_y": (translate_y, _signed(32)),
}
"""The same for TrivialAugment in its wide setting, as torchvision has it."""


def randaugment(
    key: jax.Array, images: jax.Array, *, layers: int, magnitude: float, std: float
) -> jax.Array:
    """Applies random operations one after the other (Cubuk et al., 2020), as timm's "rand" does.

    Args:
      key: source of all randomness.
      images: (N, H, W, 3) uint8.
      layers: how many; each is left out with probability 1/2.
      magnitude: the mean strength, where 10 is the highest.
      std: the standard deviation of the strength of an image, which is cut off at 0 and 10.
    """

    def strengths(key: jax.Array, shape: Sequence[int]) -> jax.Array:
        return jnp.clip((magnitude + std * jax.random.normal(key, shape)) / 10, 0, 1)

    for layer in range(layers):
        layer_key = jax.random.fold_in(key, layer)
        images = _apply(layer_key, images, RANDAUGMENT, strengths, probability=0.5)
    return images


def trivialaugment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Applies one operation of one of 31 strengths (Müller and Hutter, ICCV 2021), the wide ones.

    Args:
      key: source of all randomness.
      images: (N, H, W, 3) uint8.
    """

    def strengths(key: jax.Array, shape: Sequence[int]) -> jax.Array:
        return jax.random.randint(key, shape, 0, 31) / 30

    return _apply(key, images, TRIVIALAUGMENT, strengths, probability=1.0)


def _apply(
    key: jax.Array,
    images: jax.Array,
    policy: dict[str, tuple[Operation, Callable]],
    strengths: Callable[[jax.Array, Sequence[int]], jax.Array],
    *,
    probability: float,
) -> jax.Array:
    """Applies one operation of a policy to each image.

    Every image has a strength and a sign of its own, but so that no image goes through more than
    its own operation, a batch has up to `SLOTS` of them: that of image i is the i-th, modulo their
    number. Each is as likely as any other, whatever the others are.
    """
    slots = max(number for number in range(1, SLOTS + 1) if len(images) % number == 0)
    split = images.reshape(-1, slots, *images.shape[1:]).swapaxes(0, 1)
    index_key, leave_key, strength_key, sign_key = jax.random.split(key, 4)
    index = jax.random.randint(index_key, (slots,), 0, len(policy))
    leave = ~jax.random.bernoulli(leave_key, probability, (slots,))
    strength = strengths(strength_key, split.shape[:2])
    sign = jax.random.rademacher(sign_key, split.shape[:2], jnp.float32)

    def branch(operation: Operation, number: Callable) -> Callable:
        return lambda x, strength, sign: jax.vmap(operation)(x, number(strength, sign))

    branches = [branch(*row) for row in policy.values()] + [lambda x, *_: x]
    index = jnp.where(leave, len(policy), index)
    split = jax.lax.map(
        lambda slot: jax.lax.switch(slot[0], branches, *slot[1:]), (index, split, strength, sign)
    )
    return split.swapaxes(0, 1).reshape(images.shape)
