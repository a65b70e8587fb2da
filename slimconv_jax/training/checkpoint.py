"""Writes and reads the checkpoints of a training run, with Orbax, in the background."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
import orbax.checkpoint as ocp
from etils import epath

from slimconv_jax.errors import LIBRARY_ERRORS, InputError
from slimconv_jax.storage.checkpoints import CHECKPOINTS, write_checksums
from slimconv_jax.training.step import TrainState


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of a work directory, saved in the background.

    Use as a context manager: the end of the block waits until everything is saved. With several
    processes, all make the same calls, with a work directory that all can reach.

    Args:
      workdir: holds them in `checkpoints/`.
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

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, KeyboardInterrupt):
            return  # after a second Ctrl-C nobody wants to wait
        try:
            self.wait()
            self._manager.close()
        except InputError:
            if error is None:  # else the run has failed for another reason already
                raise

    def save(self, step: int, state: TrainState, *, best: Sequence[int] = ()) -> None:
        """Starts to save a state, which may be donated as soon as this returns.

        The model is a separate item, so that `load_model` needs no knowledge of optimisers. So is
        the moving average, if there is one.

        Args:
          step: steps done.
          state: after them.
          best: steps, the best first; the first one that has a checkpoint keeps it.

        Raises:
          ValueError: if this checkpoint or the one before cannot be written.
        """
        self.wait()
        self._saving, self._best.ranking = step, best
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        with self._explained(f"write the checkpoint of step {step}"):
            if not self._manager.save(step, args=ocp.args.Composite(**items)):
                raise RuntimeError(f"there is one of step {self._manager.latest_step()}")

    def wait(self) -> None:
        """Waits until everything is saved.

        Raises:
          ValueError: if the checkpoint cannot be written.
        """
        with self._explained(f"write the checkpoint of step {self._saving}"):
            self._manager.wait_until_finished()

    def restore(
        self, step: int, *, like: TrainState, sharding: jax.sharding.Sharding
    ) -> TrainState:
        """Reads the state of a step.

        Args:
          step: which has a checkpoint.
          like: a state with the same shapes and dtypes, which may be abstract.
          sharding: of all arrays.

        Raises:
          ValueError: if it cannot be read, or its shapes or dtypes differ from those of `like`.
        """
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like
        )
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract).items()}
        with self._explained(f"read the checkpoint of step {step}, or it is of another config"):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return TrainState(
            variables=restored["model"], **restored["optimizer"], ema=restored.get("ema")
        )

    def _seal(self) -> None:
        """Adds checksums to the checkpoint after it is written and before it is committed."""
        if jax.process_index() == 0:
            # Its name has a suffix until it is committed, except in object stores.
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
        """Returns False: `StopSignal` asks JAX, whose answer depends on the last step asked for."""
        return False


class _Best:
    """A policy that preserves the first step of a ranking that has a checkpoint."""

    ranking: Sequence[int] = ()

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = next((step for step in self.ranking if step in steps), None)
        return [step == best for step in steps]


def _items(state: TrainState) -> dict[str, dict]:
    optimizer = {"step": state.step, "opt_state": state.opt_state}
    items = {"model": state.variables, "optimizer": optimizer, "ema": state.ema}
    return {name: tree for name, tree in items.items() if tree is not None}
