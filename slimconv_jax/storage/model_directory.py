"""Models on disk: a directory with the weights, and model.json, which says of which model.

    save_model(model, "sc_resnet50")
    model = load_model("sc_resnet50")

The weights are an Orbax checkpoint, or one .safetensors file. A directory appears once it is
complete, or not at all. The work directory of a training run has a model.json too, and its weights
are in the newest of its checkpoints.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import time
import types
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.typing import Dtype

from slimconv_jax import __version__
from slimconv_jax.console import say
from slimconv_jax.devices import find_devices
from slimconv_jax.errors import LIBRARY_ERRORS, InputError, import_extra, require_choice
from slimconv_jax.files import (
    MissingFileError,
    absolute,
    checksum,
    list_files,
    read_json,
    verify_files,
)
from slimconv_jax.models.complexity import count_params
from slimconv_jax.models.resnet import ResNet, ResNetConfig, as_dtype
from slimconv_jax.models.slimconv import k_from_reduction
from slimconv_jax.models.variables import by_name, variables
from slimconv_jax.models.zoo import abstract_resnet, name_of, require_resnet
from slimconv_jax.storage.checkpoints import (
    CHECKPOINTS,
    choose_checkpoints,
    list_checkpoints,
    verify_checksums,
)

_WEIGHTS = {"orbax": "weights", "safetensors": "weights.safetensors"}
FORMATS = tuple(_WEIGHTS)
DESCRIPTION = "model.json"

_NOT_INFO = ("name", "k", "architecture", "parameters", "format", "versions", "files")
"""The keys of model.json beside `info`, whose entries were beside these until version 0.1."""


def save_model(
    model: ResNet,
    path: epath.PathLike,
    *,
    format: str = "orbax",
    overwrite: bool = False,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model to a new directory.

    Args:
      model: a ResNet of this package.
      path: the directory; its parent must exist.
      format: "orbax", or "safetensors", with our names, joined by dots, in our layout.
      overwrite: whether to replace a model that is there already, once the new one is complete.
      info: more entries for model.json. What this package reads are `class_names`, a list, and
        `preprocessing`, with `image_size` (None for images as they are), `mean` and `std`, and
        `image_shape`, (H, W, 3) of the images that the model was trained on.

    Raises:
      ValueError: if the directory exists (and is not to be overwritten, or is not a model), cannot
        be written, or the model is not one of this package.
    """
    require_resnet(model, "save_model")
    require_choice("format", format, FORMATS)
    description = describe(model, format, info)
    try:
        json.dumps(description)
    except (TypeError, ValueError) as error:
        raise InputError(f"info must be what JSON can hold: {error}") from None
    with _new_directory(path, overwrite=overwrite) as directory:
        try:
            _write_weights(model, directory / _WEIGHTS[format])
        except LIBRARY_ERRORS as error:  # of a full disk, say
            raise InputError(f"cannot write {path}: {error}") from None
        description["files"] = {n: checksum(file) for n, file in list_files(directory).items()}
        (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def describe(model: ResNet, format: str, info: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the content of model.json without the checksums."""
    config = model.config
    return {
        "name": name_of(config),
        "k": config.reduction and str(k_from_reduction(config.reduction)),
        "architecture": dataclasses.asdict(config),
        "parameters": count_params(model),
        "format": format,
        "versions": versions(),
        "info": dict(info or {}),
    }


def versions() -> dict[str, str]:
    """Returns the versions of this package and of those that its results and files depend on."""
    packages = ("jax", "flax", "orbax-checkpoint")
    # A clone that is on the path, but not installed, has no metadata.
    return {"slimconv_jax": __version__} | {p: importlib.metadata.version(p) for p in packages}


def read_info(path: epath.PathLike) -> dict[str, Any]:
    """Reads the entries of model.json that came from the `info` of `save_model`.

    Raises:
      ValueError: if there is no such file, or it is damaged.
    """
    directory = absolute(path)
    description = read_description(directory)
    info = description.get("info")
    if info is None:
        info = {key: value for key, value in description.items() if key not in _NOT_INFO}
    damage = None
    if not isinstance(info, dict):
        damage = "info is not a section"
    elif not _is_list_of(str, info.get("class_names", [])):
        damage = "class_names is not a list of names"
    elif not isinstance(info.get("preprocessing", {}), dict):
        damage = "preprocessing is not a section"
    elif not _is_list_of(int, shape := info.get("image_shape", [1, 1, 3])) or len(shape) != 3:
        damage = "image_shape is not a shape"
    if damage:
        raise InputError(f"{directory / DESCRIPTION} is damaged: {damage}")
    return info


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def read_description(directory: epath.Path) -> dict[str, Any]:
    """Reads the content of model.json.

    Raises:
      ValueError: if there is none, or it is damaged.
    """
    try:
        description = read_json(directory / DESCRIPTION)
    except MissingFileError:
        missing = f"{directory} holds no model: there is no {DESCRIPTION}"
        if not directory.is_dir():
            missing = f"there is no directory {directory}"
        if directory.is_file():
            missing = f"{directory} is a file, and a model is a directory"
        raise InputError(missing) from None
    if not isinstance(description, dict):
        raise InputError(f"{directory / DESCRIPTION} does not describe a model")
    return description


def _write_weights(model: ResNet, path: epath.Path) -> None:
    if path.suffix:
        arrays = {name: np.asarray(value[...]) for name, value in by_name(model).items()}
        with _safetensors() as safetensors:
            safetensors.numpy.save_file(arrays, path)
    else:
        import orbax.checkpoint as ocp

        # Not the asynchronous one, whose threads would go on after a failure.
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=ocp.args.StandardSave(variables(model)))


@contextlib.contextmanager
def _safetensors() -> Iterator[types.ModuleType]:
    """Imports the package, and turns its errors into OSErrors."""
    import_extra("safetensors.numpy", extra="train", package="safetensors")
    package = import_extra("safetensors", extra="train")
    try:
        yield package
    except package.SafetensorError as error:
        raise OSError(str(error)) from None


def _read_weights(path: epath.Path, model: ResNet) -> dict[str, np.ndarray]:
    """Reads the arrays of a model by name, joined by dots."""
    if path.suffix:
        with _safetensors() as safetensors:
            return safetensors.numpy.load_file(path)
    import orbax.checkpoint as ocp

    # NumPy arrays have no sharding, so every host can restore them.
    like = jax.tree.map(lambda v: np.empty(v.shape, v.dtype), variables(model))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(path, args=ocp.args.StandardRestore(like))
    return {
        jax.tree_util.keystr(path[1:], simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def load_model(
    path: epath.PathLike,
    *,
    dtype: Dtype | None = None,
    checkpoint: int | None = None,
    ema: bool = False,
    average: int = 1,
) -> ResNet:
    """Loads the model in a directory that `save_model`, convert_weights.py or train.py wrote.

    The model is in evaluation mode. Parameters and batch statistics are float32, whatever they
    were when they were saved.

    Args:
      path: the directory; of a training run, the work directory.
      dtype: dtype of the computation, as in `create_model`; not part of what is saved.
      checkpoint: of a training run, the step whose checkpoint to load; None for the newest.
      ema: of a training run, whether to load the moving average of the weights.
      average: of a training run, the number of checkpoints, that of `checkpoint` and those before
        it, whose weights and statistics are averaged.

    Raises:
      ValueError: if there is no complete model.
    """
    dtype = as_dtype(dtype)
    directory = absolute(path)
    description = read_description(directory)
    try:
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in description["architecture"].items()
        }
        is_run = description["format"] == CHECKPOINTS
        weights = directory / (CHECKPOINTS if is_run else _WEIGHTS[description["format"]])
        files = {} if is_run else {**description["files"]}
        model = abstract_resnet(ResNetConfig(**fields), dtype=dtype)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{directory / DESCRIPTION} does not describe a model: {type(error).__name__} {error}"
        ) from None
    if is_run:
        taken = choose_checkpoints(directory, checkpoint, average)
        places = [path / ("ema" if ema else "model") for path in taken]
        for path, weights in zip(taken, places, strict=True):
            try:
                verify_checksums(path)
            except InputError as error:
                others = [other.name for other in list_checkpoints(directory) if other != path]
                hint = f"; there are also those of {', '.join(others)}, see --checkpoint"
                raise InputError(f"{error}{hint if others else ''}") from None
            if not weights.exists():
                raise InputError(f"{path} has no moving average; config.step.ema_decay is 0 there")
    elif ema or checkpoint is not None or average != 1:
        raise InputError(f"{directory} is not a training run, so it has one set of weights only")
    else:
        places = [weights]
        verify_files(directory, files, of=places)
    targets = by_name(model)
    find_devices()  # if there are none, this says so: the weights are not to blame
    try:
        sets = [_read_weights(place, model) for place in places]
    except InputError:
        raise
    except LIBRARY_ERRORS as error:
        raise InputError(f"the weights in {weights} cannot be read: {error}") from None
    shapes = {name: variable.shape for name, variable in targets.items()}
    for place, arrays in zip(places, sets, strict=True):
        if {name: array.shape for name, array in arrays.items()} != shapes:
            raise InputError(
                f"the weights in {place} are not those of {DESCRIPTION}'s architecture"
            )
    arrays = sets[0]
    if len(sets) > 1:
        arrays = {name: np.mean([each[name] for each in sets], 0, float) for name in arrays}
    for name, variable in targets.items():
        variable.set_value(jnp.asarray(arrays[name], variable.dtype))
    model.eval()
    return model


def verify_weights(model: ResNet, path: epath.PathLike) -> None:
    """Checks that a saved model has the weights of a model, to the last bit.

    Raises:
      ValueError: if it does not, or cannot be loaded.
    """
    expected, saved = by_name(model), by_name(load_model(path))
    if expected.keys() != saved.keys() or not all(
        np.array_equal(expected[name][...], saved[name][...], equal_nan=True) for name in expected
    ):
        raise InputError(f"{path} does not have the weights that were written")


def check_destination(path: epath.PathLike, *, overwrite: bool) -> None:
    """Checks that `save_model` can write there, before long work.

    Raises:
      ValueError: as `save_model`.
    """
    directory = absolute(path)
    if directory.exists():
        if not overwrite:
            raise InputError(
                f"{directory} exists already; --overwrite (overwrite=True) replaces it"
            )
        if stranger := _stranger(directory):
            raise InputError(
                f"{directory} is not overwritten, since it is not just a saved model: {stranger}"
            )
    if not directory.parent.is_dir():
        raise InputError(f"cannot write {directory}: there is no directory {directory.parent}")
    probe = directory.parent / f".slimconv_jax-{uuid.uuid4().hex[:8]}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror}") from None


@contextlib.contextmanager
def _new_directory(path: epath.PathLike, *, overwrite: bool) -> Iterator[epath.Path]:
    """Yields a directory that gets its name once it is complete, and is deleted on failure."""
    check_destination(path, overwrite=overwrite)
    directory = absolute(path)
    hidden = directory.parent / f".slimconv_jax-{uuid.uuid4().hex[:8]}"
    part, old = hidden / "new", hidden / "old"
    try:
        part.mkdir(parents=True)
        yield part
        if directory.exists():
            directory.rename(old)
        part.rename(directory)
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error}") from None
    finally:
        if old.exists() and not directory.exists():
            old.rename(directory)
        _delete(hidden)


def _delete(directory: epath.Path) -> None:
    """Deletes a directory, to which threads of Orbax may still write after an interruption."""
    for seconds in (0.1, 0.5, 2.0):
        try:
            directory.rmtree(missing_ok=True)
            return
        except OSError as error:
            reason = error.strerror or error
            time.sleep(seconds)
    say(f"warning: {directory} cannot be deleted: {reason}")


def _stranger(directory: epath.Path) -> str | None:
    """Returns why a directory is not just what `save_model` wrote; None if it is."""
    try:
        ours = {DESCRIPTION, *read_json(directory / DESCRIPTION)["files"]}
        strangers = sorted(list_files(directory).keys() - ours)
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no {DESCRIPTION} of ours"
    return f"{strangers[0]} is in it" if strangers else None
