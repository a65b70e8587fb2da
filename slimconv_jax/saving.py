"""Models on disk: a directory with the weights, and model.json, which says of which model.

    save_model(model, "sc_resnet50")
    model = load_model("sc_resnet50")

The weights are an Orbax checkpoint, or one .safetensors file. A directory appears complete or
not at all. The work directory of a training run has a model.json too, and its weights are in the
newest of its checkpoints.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath
from flax import nnx
from flax.typing import Dtype

from slimconv_jax.devices import find_devices
from slimconv_jax.errors import LIBRARY_ERRORS, InputError
from slimconv_jax.files import (
    MissingFileError,
    absolute,
    checksum,
    list_files,
    read_json,
    replace_file,
    verify_files,
)
from slimconv_jax.models.complexity import count_params
from slimconv_jax.models.resnet import ResNet, ResNetConfig, as_dtype
from slimconv_jax.models.slimconv import k_from_reduction
from slimconv_jax.models.zoo import abstract_resnet, name_of, require_resnet
from slimconv_jax.work_directory import (
    CHECKPOINTS,
    DESCRIPTION,
    choose_checkpoint,
    verify_checksums,
)

PyTree = Any

FORMATS = ("orbax", "safetensors")

_WEIGHTS = {"orbax": "weights", "safetensors": "weights.safetensors"}
_NOT_INFO = ("name", "k", "architecture", "parameters", "format", "versions", "files")


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
      overwrite: whether a model that is there already is replaced, when the new one is complete.
      info: more entries for model.json. What this package reads are `class_names`, a list, and
        `preprocessing`, with `image_size` (None for images as they are), `mean` and `std`, and
        `image_shape`, (H, W, 3) of the images that the model was trained on.

    Raises:
      ValueError: if the directory exists (and is not to be overwritten, or is no model), cannot
        be written, or the model is none of ours.
    """
    require_resnet(model, "save_model")
    if format not in FORMATS:
        raise InputError(f"format={format!r} must be one of {', '.join(map(repr, FORMATS))}")
    description = _describe(model, format, info)
    with _new_directory(path, overwrite=overwrite) as directory:
        try:
            _write_weights(model, directory / _WEIGHTS[format])
        except (*LIBRARY_ERRORS, safetensors.SafetensorError) as error:  # of a full disk, say
            raise InputError(f"cannot write {path}: {error}") from None
        description["files"] = {n: checksum(file) for n, file in list_files(directory).items()}
        (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def _describe(model: ResNet, format: str, info: Mapping[str, Any] | None) -> dict[str, Any]:
    config = model.config
    return {
        **(info or {}),
        "name": name_of(config),
        "k": config.reduction and str(k_from_reduction(config.reduction)),
        "architecture": dataclasses.asdict(config),
        "parameters": count_params(model),
        "format": format,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of this package, and of those on which depends what it computes and saves."""
    packages = ("slimconv_jax", "jax", "flax", "orbax-checkpoint")
    return {package: importlib.metadata.version(package) for package in packages}


def describe_workdir(model: ResNet, workdir: epath.Path, info: Mapping[str, Any]) -> None:
    """Writes the model.json of a training run, with which its work directory is a saved model.

    Args:
      model: the model, which may be abstract.
      workdir: the directory, which exists.
      info: as in `save_model`; if there is a model.json, its `class_names` must be these.

    Raises:
      ValueError: if the directory has other classes or another architecture, or cannot be written.
    """
    file = workdir / DESCRIPTION
    if file.exists():
        there = read_info(workdir).get("class_names")
        if there != info["class_names"]:
            raise InputError(
                f"the classes of the data are not those that {workdir} was trained on: "
                f"{len(info['class_names'])} there are now, such as {info['class_names'][0]!r}, "
                f"and {len(there or ())} there were"
            )
        # A file of channels may have changed since.
        before = _read_description(workdir).get("architecture")
        if not isinstance(before, dict):
            raise InputError(f"{file} is damaged: it has no architecture")
        now = json.loads(json.dumps(dataclasses.asdict(model.config)))
        if other := [name for name in before if before[name] != now.get(name)]:
            raise InputError(
                f"{workdir} holds a model of another architecture, of other {', '.join(other)}; "
                "choose another --workdir, or delete this one"
            )
    text = json.dumps(_describe(model, CHECKPOINTS, info), indent=2) + "\n"
    try:
        replace_file(file, text.encode())
    except OSError as error:
        raise InputError(f"cannot write {file}: {error}") from None


def read_info(path: epath.PathLike) -> dict[str, Any]:
    """The entries of model.json that came from the `info` of `save_model`.

    Raises:
      ValueError: if there is no such file, or it is damaged.
    """
    directory = absolute(path)
    description = _read_description(directory)
    info = {key: value for key, value in description.items() if key not in _NOT_INFO}
    names, shape = info.get("class_names", []), info.get("image_shape", [1, 1, 3])
    damage = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        damage = "class_names is no list of names"
    elif not isinstance(info.get("preprocessing", {}), dict):
        damage = "preprocessing is no section"
    elif not isinstance(shape, list) or [type(side) for side in shape] != [int] * 3:
        damage = "image_shape is no shape"
    if damage:
        raise InputError(f"{directory / DESCRIPTION} is damaged: {damage}")
    return info


def _read_description(directory: epath.Path) -> dict[str, Any]:
    try:
        description = read_json(directory / DESCRIPTION)
    except MissingFileError:
        missing = f"{directory} holds no model: there is no {DESCRIPTION}"
        if not directory.is_dir():
            missing = f"there is no directory {directory}"
        raise InputError(missing) from None
    if not isinstance(description, dict):
        raise InputError(f"{directory / DESCRIPTION} does not describe a model")
    return description


def _write_weights(model: ResNet, path: epath.Path) -> None:
    if path.suffix:
        import safetensors.numpy

        arrays = {name: np.asarray(value[...]) for name, value in _by_name(model).items()}
        safetensors.numpy.save_file(arrays, path)
    else:
        import orbax.checkpoint as ocp

        # Not the asynchronous one, whose threads would go on after a failure.
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=ocp.args.StandardSave(_collections(model)))


def load_model(
    path: epath.PathLike,
    *,
    dtype: Dtype | None = None,
    checkpoint: int | None = None,
    ema: bool = False,
) -> ResNet:
    """The model in a directory that `save_model`, convert_weights.py or train.py wrote.

    It is in evaluation mode. Parameters and batch statistics are float32, whatever they were
    when they were saved.

    Args:
      path: the directory; of a training run, the work directory.
      dtype: dtype of the computation, as in `create_model`; not part of what is saved.
      checkpoint: of a training run, the step whose checkpoint is taken; None for the newest.
      ema: of a training run, whether to take the moving average of the weights.

    Raises:
      ValueError: if there is no complete model.
    """
    dtype = as_dtype(dtype)
    directory = absolute(path)
    description = _read_description(directory)
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
    if not is_run and (ema or checkpoint is not None):
        raise InputError(f"{directory} is no training run, so it has one set of weights only")
    if is_run:
        taken = choose_checkpoint(directory, checkpoint)
        verify_checksums(taken)
        weights = taken / ("ema" if ema else "model")
        if not weights.exists():
            raise InputError(f"{taken} has no moving average; config.step.ema_decay is 0 there")
    else:
        verify_files(directory, files, of=[weights])
    variables = _by_name(model)
    find_devices()  # that there are none is no fault of the weights
    try:
        if weights.suffix:
            import safetensors.numpy

            arrays = safetensors.numpy.load_file(weights)
        else:
            import orbax.checkpoint as ocp

            # Asked for as NumPy arrays, they come without a sharding, on every host alike.
            like = jax.tree.map(lambda v: np.empty(v.shape, v.dtype), _collections(model))
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                tree = checkpointer.restore(weights, args=ocp.args.StandardRestore(like))
            arrays = _flatten(tree)
    except (*LIBRARY_ERRORS, safetensors.SafetensorError) as error:
        raise InputError(f"the weights in {weights} cannot be read: {error}") from None
    if {name: array.shape for name, array in arrays.items()} != {
        name: variable.shape for name, variable in variables.items()
    }:
        raise InputError(f"the weights in {weights} are not those of {DESCRIPTION}'s architecture")
    for name, variable in variables.items():
        variable.set_value(jnp.asarray(arrays[name], variable.dtype))
    model.eval()
    return model


def verify_weights(model: ResNet, path: epath.PathLike) -> None:
    """Makes sure that a saved model has the weights of a model, to the last bit.

    Raises:
      ValueError: if it has not, or cannot be loaded.
    """
    expected, saved = _by_name(model), _by_name(load_model(path))
    if expected.keys() != saved.keys() or not all(
        np.array_equal(expected[name][...], saved[name][...], equal_nan=True) for name in expected
    ):
        raise InputError(f"{path} does not have the weights that were written")


def check_destination(path: epath.PathLike, *, overwrite: bool) -> None:
    """Makes sure that `save_model` could write there, before long work.

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
    """A directory that gets its name when it is complete, and is deleted if that fails."""
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
        hidden.rmtree(missing_ok=True)


def _stranger(directory: epath.Path) -> str | None:
    """What keeps a directory from being just what `save_model` wrote."""
    try:
        ours = {DESCRIPTION, *read_json(directory / DESCRIPTION)["files"]}
        strangers = sorted(list_files(directory).keys() - ours)
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no {DESCRIPTION} of ours"
    return f"{strangers[0]} is in it" if strangers else None


def _by_name(model: ResNet) -> dict[str, nnx.Variable]:
    """Parameters and batch statistics by path, joined by dots."""
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _collections(model: ResNet) -> dict[str, PyTree]:
    """What Orbax is given, the same as the item "model" of a run's checkpoints."""
    return {
        name: nnx.to_pure_dict(nnx.state(model, kind))
        for name, kind in (("params", nnx.Param), ("batch_stats", nnx.BatchStat))
    }


def _flatten(collections: Mapping[str, PyTree]) -> dict[str, np.ndarray]:
    """Their leaves by path, joined by dots, as `_by_name` has them."""
    return {
        ".".join(str(key.key) for key in path): leaf
        for tree in collections.values()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
