"""The checkpoints of a training run, which Orbax writes in the background."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
import orbax.checkpoint as ocp
from etils import epath

from slimconv_jax.errors import LIBRARY_ERRORS, InputError
from slimconv_jax.storage.checkpoints import CHECKPOINTS, write_checksums
from slimconv_jax.training.step import TrainState


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
            if not self._manager.save(step, args=ocp.args.Composite(**items)):
                raise RuntimeError(f"there is one of step {self._manager.latest_step()}")

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
        return TrainState(
            variables=restored["model"], **restored["optimizer"], ema=restored.get("ema")
        )

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
        "model": state.variables,
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }
    if state.ema is not None:
        items["ema"] = state.ema
    return items
