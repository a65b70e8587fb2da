"""Classifies image files with saved models."""

import functools
import glob
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from slimconv_jax.console import Progress
from slimconv_jax.data.image_files import find_images, is_image, list_images, warn_of_others
from slimconv_jax.data.loader import ResidentDataset, StreamedDataset, round_up
from slimconv_jax.data.sources import ImageFiles
from slimconv_jax.data.transforms import MOST_PIXELS
from slimconv_jax.devices import data_mesh, replicated
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.files import is_address, locate
from slimconv_jax.inference.pieces import in_pieces
from slimconv_jax.inference.saved import SavedModel, open_model
from slimconv_jax.models.surgery import fold_batch_norm


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
    """The likeliest classes of one image; none if it was left out.

    Attributes:
      image: the file.
      guesses: the five likeliest classes, or all if there are fewer, the likeliest first.
    """

    image: str
    guesses: list[Guess]


def expand_paths(paths: Sequence[str]) -> list[str]:
    """Lists the image files of files, folders and patterns such as "photos/**/*.jpg".

    In folders and matches of patterns, only files with the endings of images count.

    Raises:
      ValueError: if one of them does not exist, or has no images.
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


def predict(
    model: SavedModel | epath.PathLike,
    images: Sequence[str],
    *,
    batch_size: int = 64,
    on_error: str = "raise",
    max_pixels: int = MOST_PIXELS,
) -> Iterator[Prediction]:
    """Classifies image files with a saved model, in batches, with progress on standard error.

    Args:
      model: a directory that `load_model` takes, or from `open_model`.
      images: files, folders and patterns; see `expand_paths`.
      batch_size: images at once, if there are as many.
      on_error: "raise", or "skip" to leave out images that cannot be decoded.
      max_pixels: see `Transform`.

    Returns:
      An iterator over the predictions, one for each image, in order.

    Raises:
      ValueError: if something cannot be used.
    """
    require_integer("batch_size", batch_size, 1)
    saved = model if isinstance(model, SavedModel) else open_model(model)
    if not saved.model.config.num_classes:
        raise InputError(f"{saved.path} has no classifier, so it predicts no classes")
    files = expand_paths(images)
    mesh = data_mesh()
    dataset = saved.dataset(ImageFiles(files), mesh, on_error=on_error, max_pixels=max_pixels)
    trained_on = tuple(saved.info.get("image_shape", dataset.image_shape))
    if saved.preprocessing.image_size is None and dataset.image_shape != trained_on:
        shapes = ("{1}x{0}".format(*shape) for shape in (trained_on, dataset.image_shape))
        raise InputError(
            "the model was trained on images of {} pixels and takes them as they are, and these "
            "have {}; --image-size N (image_size) resizes them".format(*shapes)
        )
    jax.eval_shape(saved.normalize, jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.uint8))
    return _predictions(saved, files, dataset, mesh, batch_size)


def _predictions(
    saved: SavedModel,
    files: Sequence[str],
    dataset: ResidentDataset | StreamedDataset,
    mesh: jax.sharding.Mesh,
    batch_size: int,
) -> Iterator[Prediction]:
    num_classes, prepare = saved.model.config.num_classes, saved.normalize
    names = saved.class_names or [str(index) for index in range(num_classes)]
    graphdef, state = nnx.split(fold_batch_norm(saved.model))
    state = jax.device_put(state, replicated(mesh))

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def guess(state: nnx.State, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, state)
        logits = in_pieces(model, images, prepare=prepare, mesh=mesh)
        return jax.lax.top_k(jax.nn.softmax(logits), min(5, num_classes))

    batch_size = round_up(min(batch_size, len(files)), mesh.size)
    remaining = iter(files)
    with Progress("predicting", len(files), stderr=True) as progress:
        for batch in dataset.eval_batches(batch_size):
            arrays = (*guess(state, batch["image"]), batch["mask"])
            rows = zip(*map(np.asarray, arrays), strict=True)
            # The rows after the last image are padding.
            for (probabilities, classes, is_there), image in zip(rows, remaining, strict=False):
                best = zip(classes.tolist(), probabilities.tolist(), strict=True)
                guesses = [Guess(names[index], index, share) for index, share in best]
                yield Prediction(image, guesses if is_there else [])
                progress.advance(1)
