"""The work directory: which run it belongs to, and its checkpoints."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from etils import epath

from slimconv_jax.console import say
from slimconv_jax.errors import LIBRARY_ERRORS, InputError, printable
from slimconv_jax.files import absolute, is_address
from slimconv_jax.saving import (
    CHECKPOINTS,
    list_checkpoints,
    verify_checksums,
    write_checksums,
)
from slimconv_jax.training.step import EMA, TrainState

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


_LOCK = ".lock"
"""The file of a work directory that says who trains in it, and is locked as long as he does."""


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
        file = open(workdir / _LOCK, "a+", opener=_open_file)  # noqa: SIM115
    except OSError as error:
        raise _unwritable(workdir, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = printable(file.read(200).strip()) or "another run"
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
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
            file.flush()
        except OSError as error:
            raise _unwritable(workdir, error) from None
        yield


def _open_file(path: str, flags: int) -> int:
    """Opens a file, but no pipe that has to be waited for."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


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
    file = path / "config.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            for name in ("checkpoints", "model.json"):
                if (path / name).exists():
                    raise InputError(
                        f"{path} holds {name} but no config.json that says of which experiment; "
                        "choose another --workdir"
                    )
        # Written in any case, to learn whether that is possible, and under another name
        # first, so that config.json is never there in part.
        part = path / "config.json.part"
        part.write_text(text)
        if file.exists() and (differences := _differences(file.read_bytes(), text)):
            part.unlink()
            raise InputError(
                f"{path} holds another experiment: {differences}; choose another --workdir, or "
                "delete this one"
            )
        part.replace(file)
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def compared_keys(text: bytes | str) -> dict[str, Any]:
    """The values of a config, as JSON text, that may not change when a run continues.

    Raises:
      ValueError: if it is no config.
    """
    try:
        flat = flatten(json.loads(text))
    except (ValueError, AttributeError):
        raise InputError("it cannot be read as a config") from None
    return {key: value for key, value in flat.items() if key not in NOT_COMPARED}


def _differences(there: bytes, here: str) -> str:
    """Which keys of two configs, as JSON texts, differ; empty if none do."""
    try:
        old, new = compared_keys(there), compared_keys(here)
    except InputError:
        return "its config.json cannot be read as a config"
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


class Checkpoints:
    """The checkpoints of a work directory; saving goes on in the background.

    Use as a context manager: the end of the block waits for what is being saved. On several
    processes all do the same, in a work directory that all can reach.

    Args:
      workdir: has them in `checkpoints/`.
      to_keep: how many of the newest are kept.
    """

    def __init__(self, workdir: epath.Path, *, to_keep: int):
        self._directory = workdir / CHECKPOINTS
        self._best = _Best()
        self._saving: int | None = None
        keep = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(to_keep), self._best]),
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )
        with self._explained("open the checkpoints"):
            self._manager = _Manager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            return  # whoever says stop twice does not want to wait
        try:
            self.wait()
            self._manager.close()
        except InputError:
            if kind is None:  # else the run has ended for another reason already
                raise

    def save(self, step: int, state: TrainState, *, best: Sequence[int] = ()) -> None:
        """Begins to save a state; it may be donated as soon as this returns.

        The model is an item of its own, so that `load_model` needs to know nothing of
        optimisers; so is the moving average, if there is one.

        Args:
          step: steps done.
          state: after them.
          best: steps, the best first, of which the first that has a checkpoint keeps it.

        Raises:
          ValueError: if this or the one before cannot be written.
        """
        self.wait()
        self._saving, self._best.ranking = step, best
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        with self._explained(f"write the checkpoint of step {step}"):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Waits until everything is saved.

        Raises:
          ValueError: if it cannot be written.
        """
        with self._explained(f"write the checkpoint of step {self._saving}"):
            self._manager.wait_until_finished()

    def restore(
        self, step: int, *, like: TrainState, sharding: jax.sharding.Sharding
    ) -> TrainState:
        """The state saved at a step, with the shapes of another one, which may be abstract.

        Raises:
          ValueError: if it cannot be read, or is the state of something else.
        """
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like
        )
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract).items()}
        with self._explained(f"read the checkpoint of step {step}, or it is of another config"):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        ema = EMA(**restored["ema"]) if like.ema is not None else None
        return TrainState(**restored["model"], **restored["optimizer"], ema=ema)

    def _seal(self) -> None:
        """Adds checksums to the checkpoint, all of which is written, before it is committed."""
        if jax.process_index() == 0:
            # Until then its name has a suffix, except in object stores.
            path = self._directory / str(self._saving)
            if not path.exists():
                (path,) = self._directory.glob(f"{self._saving}.*")
            write_checksums(path)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (*LIBRARY_ERRORS, ExceptionGroup) as error:  # of Orbax and TensorStore
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(
                f"cannot {what} in {self._directory}: {reason} (those before are kept)"
            ) from error


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Leaves the question to `StopSignal`: JAX takes the last number that it was asked with."""
        return False


class _Best:
    """The policy that keeps the first step of a ranking that has a checkpoint."""

    ranking: Sequence[int] = ()

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = next((step for step in self.ranking if step in steps), None)
        return [step == best for step in steps]


def _items(state: TrainState) -> dict[str, dict]:
    items = {
        "model": {"params": state.params, "batch_stats": state.batch_stats},
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }
    if state.ema is not None:
        items["ema"] = state.ema._asdict()
    return items


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
        if aside.exists():
            aside.rmtree()
        path.rename(aside)
        say(f"warning: {error}; it is now {aside}, and the run continues from the one before")
    return intact
