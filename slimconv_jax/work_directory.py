"""What the work directory of a training run holds, whose it is, and who is in it.

`config.json` is the config, `model.json` describes the model (see `slimconv_jax.saving`).
`checkpoints/` has a directory for each step that is kept, with the checksums of its files.
`metrics.jsonl` has a line for each report; `curves.png` draws them, `tensorboard/` has them, too.
`.lock` says who is in it.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import ml_collections
from etils import epath

from slimconv_jax.console import say
from slimconv_jax.errors import InputError, printable
from slimconv_jax.files import (
    MissingFileError,
    absolute,
    checksum,
    is_address,
    list_files,
    read_json,
    replace_file,
    verify_files,
)

CONFIG = "config.json"
DESCRIPTION = "model.json"
CHECKPOINTS = "checkpoints"
CHECKSUMS = "checksums.json"
METRICS = "metrics.jsonl"
PICTURE = "curves.png"
TENSORBOARD = "tensorboard"
LOCK = ".lock"


def read_run_dataset(workdir: epath.PathLike) -> dict[str, Any]:
    """`config.dataset` of a training run, as its `config.json` has it; empty if there is none.

    Raises:
      ValueError: if the file is damaged.
    """
    file = absolute(workdir) / CONFIG
    try:
        config = read_json(file)
    except MissingFileError:
        return {}
    dataset = config.get("dataset", {}) if isinstance(config, dict) else None
    if not isinstance(dataset, dict):
        raise InputError(f"{file} is damaged: it is no config")
    return dataset


def list_checkpoints(workdir: epath.Path) -> list[epath.Path]:
    """The complete checkpoints of a training run, the oldest first.

    Raises:
      ValueError: if their directory cannot be read.
    """
    directory = workdir / CHECKPOINTS
    try:
        entries = list(directory.iterdir())
    except OSError as error:
        if isinstance(error, FileNotFoundError) or not workdir.is_dir():
            return []
        raise InputError(f"cannot read {directory}: {error.strerror or error}") from None
    # The name of one that is being written is more than a number, but in object stores, where a
    # file tells that it is complete.
    is_store = "://" in os.fspath(directory)
    complete = (
        path
        for path in entries
        if path.name.isascii()
        and path.name.isdigit()
        and (not is_store or (path / "commit_success.txt").exists())
    )
    return sorted(complete, key=lambda path: int(path.name))


def choose_checkpoint(workdir: epath.Path, step: int | None) -> epath.Path:
    """The complete checkpoint of a step, or the newest one.

    Raises:
      ValueError: if there is none.
    """
    there = list_checkpoints(workdir)
    if not there:
        raise InputError(f"{workdir / CHECKPOINTS} holds no checkpoint yet")
    chosen = there[-1:] if step is None else [path for path in there if int(path.name) == step]
    if not chosen:
        steps = ", ".join(path.name for path in there)
        raise InputError(f"{workdir} has no checkpoint of step {step}; it has those of {steps}")
    return chosen[0]


def write_checksums(checkpoint: epath.Path) -> None:
    """Adds a file with the checksums of all items to a checkpoint that is about to be complete."""
    files = {
        name: checksum(file)
        for name, file in list_files(checkpoint).items()
        if "/" in name  # what lies beside the items Orbax still changes
    }
    (checkpoint / CHECKSUMS).write_text(json.dumps(files))


def verify_checksums(checkpoint: epath.Path) -> None:
    """Makes sure that a checkpoint is as it was written.

    Raises:
      ValueError: if it is damaged.
    """
    file = checkpoint / CHECKSUMS
    try:
        files = read_json(file)
    except MissingFileError:
        raise InputError(f"{file} is missing") from None
    if not isinstance(files, dict):
        raise InputError(f"{file} is damaged: it has no checksums")
    items = [path for path in checkpoint.iterdir() if path.is_dir()]
    verify_files(checkpoint, files, of=items)


NOT_COMPARED = (
    "checkpoints_to_keep",
    "dataset.data_dir",
    "eval_batch_size",
    "eval_every_epochs",
    "loader.num_threads",
    "loader.on_error",
    "log_every_steps",
    "profile_steps",
)
"""The keys that may change when a run continues, since what is learnt does not depend on them."""


@contextlib.contextmanager
def hold_workdir(workdir: epath.Path) -> Iterator[None]:
    """Keeps other runs out of a work directory, which is created if it is not there.

    The lock is the operating system's, so a run that is killed leaves none behind. In an object
    store, which has no locks, nothing is kept out.

    Raises:
      ValueError: if another run is in it, with the process, the host and the time of its start; or
        if the directory cannot be written.
    """
    if is_address(workdir):
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Opened for adding, so that what the one who holds it has written stays until then.
        file = open(workdir / LOCK, "ab+", buffering=0, opener=_open_at_once)  # noqa: SIM115
    except OSError as error:
        raise _unwritable(workdir, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = printable(file.read(200).decode(errors="replace").strip()) or "another run"
            raise InputError(
                f"{workdir} is in use by {who}; stop that, or choose another --workdir"
            ) from None
        except OSError as error:  # a file system without locks
            say(
                f"warning: {workdir} cannot be locked ({error.strerror}); start no second run there"
            )
        try:
            file.truncate(0)
            now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())
        except OSError as error:
            raise _unwritable(workdir, error) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a child has it, too


def _open_at_once(path: str, flags: int) -> int:
    # A pipe would wait for its other end, and a link might lead to what is to be kept.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)


def _unwritable(workdir: epath.Path, error: OSError) -> InputError:
    return InputError(f"cannot write to the work directory {workdir}: {error}")


def claim_workdir(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> epath.Path:
    """Creates a work directory for a config, or makes sure that it belongs to that config.

    Args:
      workdir: a directory; it is created, with its parents, if it is not there.
      config: written to `config.json` there, and compared with what is there already; only
        the keys in `NOT_COMPARED` may have changed.

    Raises:
      ValueError: if the directory cannot be written, or belongs to another experiment.
    """
    path = absolute(workdir)
    text = config.to_json_best_effort(indent=2, sort_keys=True) + "\n"
    file = path / CONFIG
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(file):
            for name in (CHECKPOINTS, DESCRIPTION):
                if (path / name).exists():
                    raise InputError(
                        f"{path} holds {name} but no config.json that says of which experiment; "
                        "choose another --workdir"
                    )
        try:
            differences = _differences(read_json(file), json.loads(text))
        except MissingFileError:
            differences = ""
        except InputError as error:
            differences = str(error)
        if differences:
            raise InputError(
                f"{path} holds another experiment: {differences}; choose another --workdir, or "
                "delete this one"
            )
        replace_file(file, text.encode())
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def compared_keys(config: Any) -> dict[str, Any]:
    """The values of a config, as JSON has it, that may not change when a run continues.

    Raises:
      ValueError: if it is no config.
    """
    if not isinstance(config, dict):
        raise InputError(f"its {CONFIG} is no config")
    return {key: value for key, value in flatten(config).items() if key not in NOT_COMPARED}


def _differences(there: Any, here: Any) -> str:
    """Which keys of two configs, as JSON has them, differ; empty if none do."""
    old, new = compared_keys(there), compared_keys(here)
    return ", ".join(
        f"config.{key} is {old.get(key, 'absent')!r} there and {new.get(key, 'absent')!r} here"
        for key in sorted(old | new)
        if old.get(key, "absent") != new.get(key, "absent")
    )


def flatten(tree: dict, prefix: str = "") -> dict:
    """The values of a config by the keys that lead to them, joined by dots."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def newest_intact(workdir: epath.Path) -> int:
    """The step of the newest checkpoint whose files are as they were written; 0 without any.

    Damaged ones after it are moved out of the way, with a warning.

    Raises:
      ValueError: if all are damaged.
    """
    damaged = {}
    intact = 0
    for path in reversed(list_checkpoints(workdir)):
        try:
            verify_checksums(path)
        except InputError as error:
            damaged[path] = error
        else:
            intact = int(path.name)
            break
    if damaged and not intact:
        raise InputError(
            f"no checkpoint in {workdir / CHECKPOINTS} can be used: "
            f"{'; '.join(map(str, damaged.values()))}; to begin anew, delete {workdir} or choose "
            "another --workdir"
        )
    for path, error in damaged.items():
        aside = workdir / f"damaged-checkpoint-{path.name}"
        try:
            if aside.exists():
                aside.rmtree()
            path.rename(aside)
        except OSError as reason:
            raise _unwritable(workdir, reason) from None
        say(f"warning: {error}; it is now {aside}, and the run continues from the one before")
    return intact
