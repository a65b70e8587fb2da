"""Evaluates saved models, of training runs or converted, on data sets."""

import functools
import inspect
import shlex
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from slimconv_jax.console import Progress
from slimconv_jax.data.datasets import load_source, with_classes
from slimconv_jax.data.loader import round_up
from slimconv_jax.data.sources import Source
from slimconv_jax.data.transforms import MOST_PIXELS
from slimconv_jax.devices import batch_sharded, data_mesh, replicated
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.inference.eval_step import make_evaluate, summarize
from slimconv_jax.inference.saved import SavedModel, open_model
from slimconv_jax.models.variables import variables
from slimconv_jax.storage.work_directory import read_recorded_config


def evaluate(
    model: SavedModel | epath.PathLike,
    data: Source | str | None = None,
    *,
    split: str | None = None,
    data_dir: epath.PathLike | None = None,
    batch_size: int = 64,
    on_error: str = "raise",
    max_pixels: int = MOST_PIXELS,
) -> dict[str, Any]:
    """Evaluates a saved model on every example of a data set, with progress.

    Args:
      model: a directory that `load_model` takes, or from `open_model`.
      data: a source, or its name; see `find_data`. Its classes are matched by name with those of
        the model, if they have names.
      split: see `find_data`.
      data_dir: see `find_data`.
      batch_size: images at once, if there are as many.
      on_error: "raise" or "skip"; see `load_dataset`.
      max_pixels: see `Transform`.

    Returns:
      What `summarize` returns, and: `skipped`, descriptions of what could not be decoded;
      `images_per_second`, from files to results, without compilation; `batch_size` as it was
      used, a multiple of the devices; `batches`, how many there were; `latency_seconds`, the
      median time of the devices for a batch, and `latency_seconds_max`, the longest.

    Raises:
      ValueError: if something cannot be used, or no example can be decoded.
    """
    require_integer("batch_size", batch_size, 1)
    saved = model if isinstance(model, SavedModel) else open_model(model)
    if data is None or isinstance(data, str):
        data, _ = find_data(saved.path, data, split=split, data_dir=data_dir)
    source = _match_classes(data, saved)
    mesh = data_mesh()
    dataset = saved.dataset(source, mesh, on_error=on_error, max_pixels=max_pixels)
    jax.eval_shape(saved.normalize, jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.uint8))
    run = make_evaluate(saved.model, normalize=saved.normalize, mesh=mesh)
    weights = jax.device_put(variables(saved.model), replicated(mesh))
    batch_size = round_up(min(batch_size, len(source)), mesh.size)

    @functools.partial(jax.jit, out_shardings=batch_sharded(mesh))
    def empty_batch():
        return {
            "image": jnp.zeros((batch_size, *dataset.image_shape), jnp.uint8),
            "label": jnp.zeros(batch_size, jnp.int32),
            "mask": jnp.zeros(batch_size, bool),
        }

    run(weights, [empty_batch()] * 2)  # compiles

    latencies = []
    start = time.perf_counter()
    with Progress("evaluating", len(source)) as progress:

        def batches():
            for batch in dataset.eval_batches(batch_size):
                yield batch
                progress.advance(min(batch_size, len(source) - progress.done))

        totals = run(weights, batches(), latencies)
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


def find_data(
    model: epath.PathLike,
    name: str | None = None,
    *,
    split: str | None = None,
    data_dir: epath.PathLike | None = None,
) -> tuple[Source, dict[str, Any]]:
    """Loads the data to evaluate a saved model on.

    Args:
      model: a directory that `load_model` takes.
      name: "digits", "tfds/NAME", "image_folder" or "synthetic"; None for what a training run was
        tested on.
      split: None for that of the run, else "test".
      data_dir: see `load_source`. Needed even if config.json of a run names one, since that file
        may be a stranger's.

    Returns:
      The data, and the arguments of `load_source` for them.

    Raises:
      ValueError: if there is no such data set, or the model does not say which it was trained on.
    """
    options = {"name": name, "split": split or "test"}
    if name is None:
        options = (read_recorded_config(model) or {}).get("dataset")
        if not options:
            raise InputError(f"{model} does not say what it was trained on, so --data is needed")
        if data_dir is None:
            refuse_data_dir(model, options)
        options["split"] = split or options.get("test_split", "test")
        options = {key: options[key] for key in options if not key.endswith("_split")}
    if data_dir is not None:
        options["data_dir"] = data_dir
    try:
        inspect.signature(load_source).bind(**options)
    except TypeError as error:  # only from the run's own config.json, which someone has changed
        raise InputError(f"{model}/config.json is damaged: {error}") from None
    return load_source(**options), options


def refuse_data_dir(model: epath.PathLike, dataset: dict[str, Any]) -> None:
    """Checks that the data of a run are not in a directory that its config.json names.

    Raises:
      ValueError: if they are, since the file may be a stranger's; it says how to read them.
    """
    if (there := dataset.get("data_dir")) is not None:
        raise InputError(
            f"{model}/config.json says that its data are in {there}; to read them from there, "
            f"add --data-dir {shlex.quote(str(there))}"
        )


def _match_classes(source: Source, saved: SavedModel) -> Source:
    """Returns a source with the labels of a model."""
    num_classes = saved.model.config.num_classes
    if not num_classes:
        raise InputError("the model has no classifier, so there is nothing to evaluate")
    if saved.class_names is not None:
        return with_classes(source, saved.class_names, of="the model")
    if len(source.class_names) != num_classes:
        raise InputError(
            f"the data have {len(source.class_names)} classes and the model {num_classes}, without "
            "names to match them by (convert_weights.py --class-names FILE gives it names)"
        )
    return source
