"""What a saved model sees in image files."""

import functools
import glob
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx
from flax.typing import Dtype

from slimconv_jax.console import Progress
from slimconv_jax.data.image_files import (
    find_images,
    is_image,
    list_images,
    warn_of_others,
)
from slimconv_jax.data.loader import load_dataset, round_up
from slimconv_jax.data.sources import ImageFiles
from slimconv_jax.data.transforms import MOST_PIXELS, Transform
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.evaluation import Preprocessing, class_names_of, preprocessing_of
from slimconv_jax.files import is_address, locate
from slimconv_jax.models.pieces import in_pieces
from slimconv_jax.models.surgery import fold_batch_norm
from slimconv_jax.saving import load_model, read_info
from slimconv_jax.training.augment import normalize
from slimconv_jax.training.step import batch_sharded, data_mesh, replicated


class Guess(NamedTuple):
    """One of the likeliest classes of an image.

    Attributes:
      name: of the class; its index in digits if the model has no names.
      index: of the class.
      probability: from 0 to 1.
    """

    name: str
    index: int
    probability: float


class Prediction(NamedTuple):
    """The likeliest classes of one image; without any if it was left out.

    Attributes:
      image: the file.
      guesses: the five likeliest classes, or all if there are fewer, the likeliest first.
    """

    image: str
    guesses: list[Guess]


def expand_paths(paths: Sequence[str]) -> list[str]:
    """The image files that are meant by files, folders and patterns such as "photos/**/*.jpg".

    Of folders, and of what a pattern matches, the files whose names end as images do.

    Raises:
      ValueError: if one of them is not there, or has no images.
    """
    files = []
    for path in paths:
        if locate(path).is_dir():
            files += find_images(path)
        # A file may have the characters of a pattern in its name.
        elif is_address(path) or os.path.lexists(path):
            files.append(path)
        elif not glob.has_magic(path):
            raise InputError(f"there is no file or directory {path!r}")
        else:
            images, others = [], set()
            for match in sorted(glob.glob(path, recursive=True)):
                if os.path.isdir(match):
                    images += list_images(match, others)
                elif is_image(match):
                    images.append(match)
                else:
                    others.add(match)
            warn_of_others(others, path)
            if not images:
                raise InputError(f"no image matches {path!r}")
            files += dict.fromkeys(images)  # once, where a pattern matches folders and files
    return files


def predict_saved(
    path: epath.PathLike,
    images: Sequence[str],
    *,
    batch_size: int = 64,
    preprocessing: Preprocessing | None = None,
    dtype: Dtype | None = None,
    on_error: str = "raise",
    max_pixels: int = MOST_PIXELS,
    checkpoint: int | None = None,
    ema: bool = False,
) -> Iterator[Prediction]:
    """Classifies image files with a saved model, in batches, with progress on standard error.

    Args:
      path: a directory that `load_model` takes.
      images: the files.
      batch_size: images at once, if there are as many.
      preprocessing: what comes before the model; None for what is saved with it.
      dtype: dtype of the computation.
      on_error: "raise", or "skip" to leave out images that cannot be decoded.
      max_pixels: see `Transform`.
      checkpoint: see `load_model`, as the next one.
      ema: whether to take a training run's averaged weights.

    Yields:
      A prediction for each image, in order.

    Raises:
      ValueError: if something cannot be used.
    """
    require_integer("batch_size", batch_size, 1)
    info = read_info(path)
    preprocessing = preprocessing or preprocessing_of(info)
    model = load_model(path, dtype=dtype, checkpoint=checkpoint, ema=ema)
    num_classes = model.config.num_classes
    if not num_classes:
        raise InputError(f"{path} has no classifier, so it predicts no classes")
    names = class_names_of(info, num_classes) or [str(index) for index in range(num_classes)]
    mesh = data_mesh()
    dataset = load_dataset(
        ImageFiles(images),
        Transform(preprocessing.image_size, max_pixels=max_pixels),
        training=False,
        sharding=batch_sharded(mesh),
        on_device=False,  # each image is needed once
        on_error=on_error,
    )
    trained_on = tuple(info.get("image_shape", dataset.image_shape))
    if preprocessing.image_size is None and dataset.image_shape != trained_on:
        shapes = ("{1}x{0}".format(*shape) for shape in (trained_on, dataset.image_shape))
        raise InputError(
            "the model was trained on images of {} pixels and takes them as they are, and these "
            "have {}; --image-size N (image_size) brings them to a size".format(*shapes)
        )
    graphdef, state = nnx.split(fold_batch_norm(model))
    state = jax.device_put(state, replicated(mesh))
    prepare = functools.partial(normalize, mean=preprocessing.mean, std=preprocessing.std)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def guess(state: nnx.State, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, state)
        logits = in_pieces(lambda x: model(prepare(x)), images, mesh=mesh)
        return jax.lax.top_k(jax.nn.softmax(logits), min(5, num_classes))

    batch_size = round_up(min(batch_size, len(images)), mesh.size)
    remaining = iter(images)
    with Progress("predicting", len(images), stderr=True) as progress:
        for batch in dataset.eval_batches(batch_size):
            rows = zip(
                *map(np.asarray, (*guess(state, batch["image"]), batch["mask"])), strict=True
            )
            # The rows after the last image are padding.
            for (probabilities, classes, is_there), image in zip(rows, remaining, strict=False):
                best = zip(classes.tolist(), probabilities.tolist(), strict=True)
                guesses = [Guess(names[index], index, share) for index, share in best]
                yield Prediction(image, guesses if is_there else [])
                progress.advance(1)
