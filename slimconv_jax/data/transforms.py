"""Turns encoded images into uint8 arrays of one size, on the host.

Evaluation does exactly what torchvision does, with Pillow. For training, only the rows that the
crop needs are decoded, at the resolution that it needs, and resized by OpenCV, several times as
fast as Pillow.
"""

import dataclasses
import io
import itertools
import math
import os
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from slimconv_jax.data.image_files import DAMAGE, formats
from slimconv_jax.errors import InputError, require_integer, require_number
from slimconv_jax.files import read_bytes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MOST_SIDE = 2**13
"""The pixels a side of the largest images for a model."""

MOST_PIXELS = 2**26
"""The default limit of the pixels of an image file that is decoded: as RGB they take 200 MB."""

MOST_IMAGE_BYTES = 2**28
"""The bytes of the largest image file that is read."""

LONGEST_RATIO = 500
"""The largest ratio of the sides of an image; resizing longer ones would fill the memory."""

cv2.setNumThreads(0)  # the loader has threads of its own


class ImageError(InputError):
    """An image that cannot be decoded."""


def decode_image(data: bytes | np.ndarray, name: str, max_pixels: int = MOST_PIXELS) -> Image.Image:
    """Decodes an image as RGB, from any format in `slimconv_jax.data.image_files`.

    Converts greyscale, palette, RGBA, CMYK and 16-bit images as torchvision's ImageFolder does, and
    like it ignores an orientation in the EXIF data.

    Args:
      data: the bytes of an image file, or pixels: (H, W, 3), uint8.
      name: of the image, for messages.
      max_pixels: of the largest image that is decoded, since a small file can hold a huge one.

    Raises:
      ValueError: if it cannot be decoded.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    try:
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            _require_pixels(*image.size, name, max_pixels)
            return image.convert("RGB")
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        reason = f"it is in none of the formats {', '.join(formats())}"
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
    raise _unreadable(name, reason)


def _unreadable(name: object, reason: str) -> ImageError:
    return ImageError(f"cannot read the image {name}: {reason}")


def _require_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        reason = f"it has {width}x{height} pixels, more than max_pixels={max_pixels}"
        raise _unreadable(name, reason)


def _require_ratio(width: int, height: int, name: str) -> None:
    if max(width, height) > LONGEST_RATIO * min(width, height):
        reason = (
            f"at {width}x{height} pixels, it is more than {LONGEST_RATIO} times as long as wide"
        )
        raise _unreadable(name, reason)


def read_image(path: os.PathLike | str) -> Image.Image:
    """Reads an image file as RGB; see `decode_image`.

    Raises:
      ValueError: if it cannot be read as an image.
    """
    try:
        data = read_bytes(path, MOST_IMAGE_BYTES)
    except OSError as error:
        raise _unreadable(path, error.strerror) from None
    return decode_image(data, str(path))


CROP_RATIO = 224 / 256
"""The side of the central square over the image's shorter side, for the published networks."""


def resize_and_crop(image: Image.Image, size: int, crop_ratio: float = CROP_RATIO) -> np.ndarray:
    """Prepares an image as for the evaluation of the published networks: (size, size, 3), uint8.

    Resizes the shorter side to size / crop_ratio, 256 pixels for a `size` of 224, with Pillow's
    antialiased bilinear filter; then takes the central square.
    """
    shorter = round(size / crop_ratio)
    # The longer side is rounded down, as torchvision does.
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def sample_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> tuple[int, int, int, int]:
    """Samples a part of an image, as torchvision's RandomResizedCrop does.

    Args:
      rng: source of randomness.
      height: of the image, in pixels.
      width: likewise.
      scale: range of the part's area, as fractions of the image's.
      ratio: range of its width over its height; the logarithm is uniform.

    Returns:
      top, left, height, width. After ten parts that do not fit, the largest central one whose
      ratio is within the range.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(
    data: bytes | np.ndarray,
    name: str,
    rng: np.random.Generator,
    *,
    size: int,
    scale: Sequence[float],
    ratio: Sequence[float],
    max_pixels: int = MOST_PIXELS,
) -> np.ndarray:
    """Decodes and resizes a random part of an image: (size, size, 3), uint8.

    Resizes bilinearly, without antialiasing unless the part is at least twice as large; such a
    part of a JPEG is decoded at a half, a quarter or an eighth of its size, and its edges lie at
    multiples of 2, 4 or 8 pixels.

    Args:
      data: see `decode_image`, also for `name`.
      rng: source of randomness; see `sample_crop` for what is drawn.
      size: pixels a side of the result.
      scale: see `sample_crop`, also for `ratio`.
      max_pixels: see `decode_image`.

    Raises:
      ValueError: if it cannot be decoded.
    """
    if (header := _jpeg_header(data)) is None:
        pixels = np.asarray(decode_image(data, name, max_pixels))
        _require_ratio(pixels.shape[1], pixels.shape[0], name)
        top, left, height, width = sample_crop(rng, *pixels.shape[:2], scale, ratio)
    else:
        _require_pixels(header.width, header.height, name, max_pixels)
        _require_ratio(header.width, header.height, name)
        top, left, height, width = sample_crop(rng, header.height, header.width, scale, ratio)
        # Decoding at a half, a quarter or an eighth of the size, where that leaves enough pixels,
        # costs less and antialiases.
        factor = next((f for f in (8, 4, 2) if min(height, width) >= f * size), 1)
        try:
            pixels = _decode_jpeg(data, header, rows=top + height, factor=factor)
        except ValueError:  # damaged, or with unusual colour sampling: Pillow knows which
            factor, pixels = 1, np.asarray(decode_image(data, name, max_pixels))
        bottom, right = -(-(top + height) // factor), -(-(left + width) // factor)
        top, left = top // factor, left // factor
        height, width = bottom - top, right - left
    part = pixels[top : top + height, left : left + width]
    # Shrinking by more than half, bilinear interpolation would skip pixels.
    shrinks = min(part.shape[:2]) >= 2 * size
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(part, (size, size), interpolation=interpolation)


class _JpegHeader(NamedTuple):
    """Attributes: height and width in pixels, and the offset of the height in the file."""

    height: int
    width: int
    offset: int


def _jpeg_header(data: bytes | np.ndarray) -> _JpegHeader | None:
    """Reads the header of a complete sequential JPEG, grey or in colour; else returns None."""
    if isinstance(data, np.ndarray) or data[:2] != b"\xff\xd8":
        return None
    # A truncated file, without the end-of-image marker, is left to Pillow, which reports it.
    if not data[-64:].rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    position = 2
    while data[position : position + 1] == b"\xff" and position + 10 <= len(data):
        marker = data[position + 1]
        if marker in (0xC0, 0xC1):  # start of frame: length, precision, height, width, components
            height = int.from_bytes(data[position + 5 : position + 7])
            width = int.from_bytes(data[position + 7 : position + 9])
            if data[position + 4] != 8 or data[position + 9] not in (1, 3) or not height * width:
                return None
            return _JpegHeader(height, width, position + 5)
        if (0xC2 <= marker <= 0xCF and marker != 0xC4) or marker == 0xDA:  # other kinds of frame
            return None
        is_padding = marker == 0xFF
        position += 1 if is_padding else 2 + int.from_bytes(data[position + 2 : position + 4])
    return None


def _decode_jpeg(data: bytes, header: _JpegHeader, *, rows: int, factor: int) -> np.ndarray:
    """Decodes the first rows of a JPEG: (ceil(rows / factor), ceil(width / factor), 3), uint8.

    At full size, the rows are those of Pillow but for the fast cosine transform, which is off by
    about 1 of 255 on average.

    The header given to the decoder says that the image ends a little below those rows, so that it
    skips the rest. A strict decoder would reject the data that follow, so this one is not: damage
    in the middle of a file, which Pillow sometimes notices, passes.
    """
    # Colours of half the resolution are interpolated between rows.
    decoded_rows = min(rows + 2 * factor, header.height)
    if decoded_rows < header.height:
        data = data[: header.offset] + decoded_rows.to_bytes(2) + data[header.offset + 2 :]
    pixels = simplejpeg.decode_jpeg(
        data,
        fastdct=True,
        min_height=-(-decoded_rows // factor),
        min_width=-(-header.width // factor),
        min_factor=factor,
        strict=False,
    )
    return pixels[: -(-rows // factor)]


def are_numbers(value: object, count: int, below: float = math.inf) -> bool:
    """Returns whether a value is a sequence of `count` numbers with magnitudes below a limit."""
    return (
        isinstance(value, Sequence)
        and len(value) == count
        and all(isinstance(number, Real) and abs(number) < below for number in value)
    )


@dataclasses.dataclass(frozen=True)
class Transform:
    """Brings images to one size; its fields are the keys of `config.transform`.

    Attributes:
      image_size: pixels a side; None leaves images as they are, which must all have one size.
      scale: of the random resized crop, the range of areas as fractions of the image's.
      ratio: of the random resized crop, the range of width over height.
      test_size: pixels a side for evaluations; None for those of training.
      progressive_sizes: pixels a side of the training images in equal parts of the run, in
        ascending order, before a last part at `image_size`. Their batches have more images, so that
        they have about as many pixels.
      crop_ratio: of evaluations, the side of the central square over the image's shorter side.
      max_pixels: the most pixels of an image file that is decoded.

    Raises:
      ValueError: if a range is not valid, or a number is too small or too large.
    """

    image_size: int | None = None
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    test_size: int | None = None
    progressive_sizes: Sequence[int] = ()
    crop_ratio: float = CROP_RATIO
    max_pixels: int = MOST_PIXELS

    def __post_init__(self):
        for name, value in (("image_size", self.image_size), ("test_size", self.test_size)):
            if value is not None:
                require_integer(f"transform: {name}", value, 1, MOST_SIDE)
        self._check_progressive_sizes()
        require_number("transform: crop_ratio", self.crop_ratio, least=0.1, most=1)
        require_integer("transform: max_pixels", self.max_pixels, 1, 178_956_970)  # Pillow's own
        for name, highest in (("scale", 1), ("ratio", math.inf)):
            value = getattr(self, name)
            if not (are_numbers(value, 2) and 0 < value[0] <= value[1] <= highest):
                limits = "0 < low <= high" + ("" if highest == math.inf else f" <= {highest}")
                raise InputError(
                    f"transform: {name}={value!r} must be two numbers, low and high, {limits}"
                )

    def _check_progressive_sizes(self) -> None:
        sizes = self.progressive_sizes
        if isinstance(sizes, str) or not isinstance(sizes, Sequence):
            raise InputError(f"transform: progressive_sizes={sizes!r} must be a list of sizes")
        if sizes and self.image_size is None:
            raise InputError(
                "transform: progressive_sizes needs an image_size, that of the last part"
            )
        for size in sizes:
            require_integer("transform: progressive_sizes: each", size, 1, MOST_SIDE)
        if any(size >= larger for size, larger in itertools.pairwise((*sizes, self.image_size))):
            raise InputError(
                f"transform: progressive_sizes={tuple(sizes)} must ascend, to less than "
                f"image_size={self.image_size}"
            )

    def for_tests(self) -> "Transform":
        """Returns the transform of evaluations, which are at a size of their own."""
        size = self.test_size or self.image_size
        return dataclasses.replace(self, image_size=size, progressive_sizes=())

    @property
    def is_random(self) -> bool:
        """Whether an image is cropped anew each time it is trained on."""
        return self.image_size is not None

    def for_training(
        self, data: bytes | np.ndarray, name: str, rng: np.random.Generator
    ) -> np.ndarray:
        """Crops an image at random, unless images stay as they are; see `random_resized_crop`."""
        if not self.is_random:
            return self.for_evaluation(data, name)
        return random_resized_crop(
            data,
            name,
            rng,
            size=self.image_size,
            scale=self.scale,
            ratio=self.ratio,
            max_pixels=self.max_pixels,
        )

    def for_evaluation(self, data: bytes | np.ndarray, name: str) -> np.ndarray:
        """Takes the central part of an image; see `decode_image` and `resize_and_crop`."""
        image = decode_image(data, name, self.max_pixels)
        if self.image_size is None:
            return np.asarray(image)
        _require_ratio(*image.size, name)
        return resize_and_crop(image, self.image_size, self.crop_ratio)
