"""A saved model, of a training run or converted, on a data set."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from flax.typing import Dtype

from slimconv_jax.console import Progress
from slimconv_jax.data.loader import load_dataset, round_up
from slimconv_jax.data.sources import Source, with_classes
from slimconv_jax.data.transforms import IMAGENET_MEAN, IMAGENET_STD, MOST_PIXELS, Transform
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.saving import load_model, read_info
from slimconv_jax.training.augment import normalize
from slimconv_jax.training.evaluate import make_evaluate, summarize
from slimconv_jax.training.step import batch_sharded, data_mesh, replicated


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What comes before a model; the defaults are those of the published ones.

    Attributes:
      image_size: pixels a side; see `Transform`.
      mean: of red, green and blue, where 1 is the largest value.
      std: likewise.
    """

    image_size: int | None = 224
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __str__(self) -> str:
        size = "images as they are"
        if self.image_size is not None:
            size = f"shorter side to 8/7 of {self.image_size}, centre of {self.image_size} pixels"
        return f"{size}; mean {tuple(self.mean)}, std {tuple(self.std)}"


def preprocessing_of(info: dict[str, Any], **changes) -> Preprocessing:
    """The preprocessing that the `info` of a saved model tells, with some changes.

    Raises:
      ValueError: if it tells something else.
    """
    try:
        return Preprocessing(**{**info.get("preprocessing", {}), **changes})
    except TypeError:
        raise InputError("model.json is damaged: its preprocessing is none") from None


def class_names_of(info: dict[str, Any], num_classes: int) -> list[str] | None:
    """The names of the classes that the `info` of a saved model tells, None if it does not.

    Raises:
      ValueError: if they are not as many as the model has classes.
    """
    names = info.get("class_names")
    if names is not None and len(names) != num_classes:
        raise InputError(f"model.json is damaged: it names {len(names)} classes of {num_classes}")
    return names


def evaluate_saved(
    path: epath.PathLike,
    source: Source,
    *,
    batch_size: int = 64,
    preprocessing: Preprocessing | None = None,
    dtype: Dtype | None = None,
    on_error: str = "raise",
    max_pixels: int = MOST_PIXELS,
    checkpoint: int | None = None,
    ema: bool = False,
) -> dict[str, Any]:
    """Evaluates a saved model on every example of a source, with progress.

    Args:
      path: a directory that `load_model` takes.
      source: whose classes are matched with those of the model by name, if it has names.
      batch_size: images at once, if there are as many.
      preprocessing: what comes before the model; None for what is saved with it.
      dtype: dtype of the computation.
      on_error: "raise" or "skip"; see `load_dataset`.
      max_pixels: see `Transform`.
      checkpoint: see `load_model`, as the next one.
      ema: whether to take a training run's averaged weights.

    Returns:
      What `summarize` gives, and: `skipped`, descriptions of what could not be decoded;
      `images_per_second`, from files to results, without compilation; `batch_size` as it was
      used, a multiple of the devices; `batches`, how many there were; `latency_seconds`, the
      median time of the devices for a batch, and `latency_seconds_max`, the longest.

    Raises:
      ValueError: if something cannot be used, or no example can be decoded.
    """
    require_integer("batch_size", batch_size, 1)
    info = read_info(path)
    preprocessing = preprocessing or preprocessing_of(info)
    model = load_model(path, dtype=dtype, checkpoint=checkpoint, ema=ema)
    names = class_names_of(info, model.config.num_classes)
    source = _match_classes(source, names, model.config.num_classes)
    mesh = data_mesh()
    dataset = load_dataset(
        source,
        Transform(preprocessing.image_size, max_pixels=max_pixels),
        training=False,
        sharding=batch_sharded(mesh),
        on_device=False,  # each image is needed once
        on_error=on_error,
    )
    prepare = functools.partial(normalize, mean=preprocessing.mean, std=preprocessing.std)
    jax.eval_shape(prepare, jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.uint8))
    evaluate = make_evaluate(model, preprocess=prepare, mesh=mesh)
    params, batch_stats = (
        jax.device_put(nnx.to_pure_dict(nnx.state(model, kind)), replicated(mesh))
        for kind in (nnx.Param, nnx.BatchStat)
    )
    batch_size = round_up(min(batch_size, len(source)), mesh.size)
    empty = _empty_batch(batch_size, dataset.image_shape, mesh)
    evaluate(params, batch_stats, [empty, empty])  # compiles

    latencies = []
    start = time.perf_counter()
    with Progress("evaluating", len(source)) as progress:

        def batches():
            for batch in dataset.eval_batches(batch_size):
                yield batch
                progress.advance(min(batch_size, len(source) - progress.done))

        totals = evaluate(params, batch_stats, batches(), latencies)
    seconds = time.perf_counter() - start
    result = summarize({key: value.item() for key, value in totals.items()})
    if not result["examples"]:
        raise InputError(f"none of the {len(source)} images can be decoded")
    return result | {
        "skipped": sorted(dataset.skipped),
        "images_per_second": result["examples"] / seconds,
        "batch_size": batch_size,
        "latency_seconds": statistics.median(latencies),
        "latency_seconds_max": max(latencies),
        "batches": len(latencies),
    }


def _empty_batch(
    batch_size: int, image_shape: Sequence[int], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    @functools.partial(jax.jit, out_shardings=batch_sharded(mesh))
    def zeros():
        return {
            "image": jnp.zeros((batch_size, *image_shape), jnp.uint8),
            "label": jnp.zeros(batch_size, jnp.int32),
            "mask": jnp.zeros(batch_size, bool),
        }

    return zeros()


def _match_classes(source: Source, class_names: Sequence[str] | None, num_classes: int) -> Source:
    """A source with the labels of a model."""
    if not num_classes:
        raise InputError("the model has no classifier, so there is nothing to evaluate")
    if class_names is not None:
        return with_classes(source, class_names, of="the model")
    if len(source.class_names) != num_classes:
        raise InputError(
            f"the data have {len(source.class_names)} classes and the model {num_classes}, without "
            "names to match them by (convert_weights.py --class-names FILE gives it names)"
        )
    return source
