"""Image files to uint8 arrays, as torchvision's evaluation does it, with Pillow."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from slimconv_jax.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def find_images(directory: os.PathLike | str) -> list[Path]:
    """The image files in a directory and all those below it, sorted.

    Raises:
      ValueError: if there is no such directory, or no image in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"there is no directory {directory}")
    files = sorted(p for p in directory.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"there are no images ({suffixes}) in {directory}")
    return files


def read_image(path: os.PathLike | str) -> Image.Image:
    """An image file as RGB.

    Raises:
      ValueError: if it cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {path}: {error}") from None


def resize_and_crop(image: Image.Image, size: int) -> np.ndarray:
    """What the published networks are evaluated on: (size, size, 3), uint8.

    The shorter side is resized to 256 pixels where `size` is 224, in proportion for other
    sizes, by Pillow's antialiased bilinear filter; then comes the central square.
    """
    shorter = round(size * 256 / 224)
    # The longer side is rounded down, as torchvision does.
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))
