"""The work directory of a training run: its files, its config, and its lock.

`config.json` is the config; `model.json` describes the model, as in the directory of a saved one.
`checkpoints/` has a directory for each step that is kept (see `slimconv_jax.storage.checkpoints`).
`metrics.jsonl` has a line for each report; `curves.png` and `tensorboard/` show the same.
`.lock` says which process uses the directory.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from etils import epath
from flax import traverse_util

from slimconv_jax.console import say
from slimconv_jax.errors import InputError, printable
from slimconv_jax.files import MissingFileError, absolute, is_address, read_json, replace_file
from slimconv_jax.models.resnet import ResNet
from slimconv_jax.storage.checkpoints import CHECKPOINTS
from slimconv_jax.storage.model_directory import DESCRIPTION, describe, read_description, read_info

CONFIG = "config.json"
METRICS = "metrics.jsonl"
PICTURE = "curves.png"
TENSORBOARD = "tensorboard"
RUN_ID = "run_id"
PROFILE = "profile"
LOCK = ".lock"


def read_recorded_config(workdir: epath.PathLike) -> dict[str, Any] | None:
    """Reads the `config.json` of a training run; returns None if there is none.

    Raises:
      ValueError: if the file is damaged.
    """
    file = absolute(workdir) / CONFIG
    try:
        config = read_json(file)
    except MissingFileError:
        return None
    if not isinstance(config, dict) or not isinstance(config.get("dataset", {}), dict):
        raise InputError(f"{file} is damaged: it is not a config")
    return config


NOT_COMPARED = (
    "loggers",
    "checkpoint_every_minutes",
    "checkpoint_every_steps",
    "checkpoints_to_keep",
    "dataset.data_dir",
    "eval_batch_size",
    "eval_every_epochs",
    "loader.num_threads",
    "loader.on_error",
    "log_every_steps",
    "profile_steps",
)
"""The keys that may change when a run continues, since the result does not depend on them."""


@contextlib.contextmanager
def hold_workdir(workdir: epath.Path) -> Iterator[None]:
    """Keeps other runs out of a work directory, which is created if it does not exist.

    The lock is the operating system's, so a run that is killed does not leave one behind. Object
    stores do not have locks, so there other runs are not kept out.

    Raises:
      ValueError: if another run uses it, with the process, the host and the time of its start; or
        if the directory cannot be written.
    """
    if is_address(workdir):
        yield
        return
    with _writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        # Opened for appending, so that the text of the process that holds the lock stays.
        file = open(workdir / LOCK, "ab+", buffering=0, opener=_open_at_once)  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = printable(file.read(200).decode(errors="replace").strip()) or "another run"
            raise InputError(
                f"{workdir} is in use by {who}; stop that, or choose another work directory"
            ) from None
        except OSError as error:  # a file system without locks
            warning = f"{workdir} cannot be locked ({error.strerror}); start no second run there"
            say(f"warning: {warning}")
        with _writing(workdir):
            file.truncate(0)
            now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a child has it too


def _open_at_once(path: str, flags: int) -> int:
    # A pipe would wait for its other end, and a link might lead to a file that must stay.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)


@contextlib.contextmanager
def _writing(workdir: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write to the work directory {workdir}: {reason}") from None


def claim_workdir(
    workdir: epath.PathLike, config: ml_collections.ConfigDict, defaults: dict
) -> epath.Path:
    """Creates a work directory for a config, or checks that it belongs to that config.

    Args:
      workdir: a directory; it is created, with its parents, if it does not exist.
      config: written to `config.json` there, and compared with the config that is there already;
        only the keys in `NOT_COMPARED` may have changed.
      defaults: of the keys of a config, as JSON has them, for a file that was written before a key
        was introduced.

    Raises:
      ValueError: if the directory cannot be written, or belongs to another experiment.
    """
    path = absolute(workdir)
    text = config.to_json_best_effort(indent=2, sort_keys=True) + "\n"
    file = path / CONFIG
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            differences = _differences(read_json(file), json.loads(text), defaults)
        except MissingFileError:
            differences = ""
            if there := [name for name in (CHECKPOINTS, DESCRIPTION) if (path / name).exists()]:
                raise InputError(
                    f"{path} holds {there[0]} but no config.json to say of which experiment; "
                    "choose another work directory"
                ) from None
        except InputError as error:
            differences = str(error)
        if differences:
            raise InputError(
                f"{path} holds another experiment: {differences}; choose another work "
                "directory, or delete this one"
            )
        replace_file(file, text.encode())
    return path


def compared_keys(config: Any, defaults: dict) -> dict[str, Any]:
    """Returns the values of a config that may not change when a run continues, by flat key.

    Args:
      config: as JSON has it; keys may be missing.
      defaults: of all keys.

    Raises:
      ValueError: if it is not a config.
    """
    if not isinstance(config, dict):
        raise InputError(f"its {CONFIG} is not a config")
    values = flatten(defaults) | flatten(config)
    # What is None may as well be absent.
    return {k: v for k, v in values.items() if k not in NOT_COMPARED and v is not None}


def _differences(there: Any, here: Any, defaults: dict) -> str:
    """Lists the keys that differ in two configs, as JSON has them; empty if they are the same."""
    old, new = (compared_keys(config, defaults) for config in (there, here))
    return ", ".join(
        f"config.{key} is {old.get(key, 'absent')!r} there and {new.get(key, 'absent')!r} here"
        for key in sorted(old | new)
        if old.get(key, "absent") != new.get(key, "absent")
    )


def flatten(tree: dict) -> dict[str, Any]:
    """Returns the values of a config by the keys that lead to them, joined by dots."""
    return traverse_util.flatten_dict(tree, sep=".")


def describe_workdir(model: ResNet, workdir: epath.Path, info: Mapping[str, Any]) -> None:
    """Writes the model.json of a training run, which makes its work directory a saved model.

    Args:
      model: the model, which may be abstract.
      workdir: the directory, which must exist.
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
                f"there are {len(info['class_names'])} now, such as {info['class_names'][0]!r}, "
                f"and there were {len(there or ())}"
            )
        # A file of channels may have changed since.
        before = read_description(workdir).get("architecture")
        if not isinstance(before, dict):
            raise InputError(f"{file} is damaged: it has no architecture")
        now = json.loads(json.dumps(dataclasses.asdict(model.config)))
        if other := [name for name in before if before[name] != now.get(name)]:
            raise InputError(
                f"{workdir} holds a model of another architecture, with other {', '.join(other)}; "
                "choose another work directory, or delete this one"
            )
    text = json.dumps(describe(model, CHECKPOINTS, info), indent=2) + "\n"
    with _writing(workdir):
        replace_file(file, text.encode())
