"""Traces training steps for TensorBoard's profiler or Perfetto."""

import contextlib

import jax
from etils import epath

from slimconv_jax.console import say

FIRST = 6
"""The first step after a start to be traced; by then everything is compiled and warm."""


class Profiler(contextlib.AbstractContextManager):
    """Traces `num_steps` steps of a run, beginning with the `FIRST` one after its start.

    Use as a context manager, and call `before` and `after` around each step.

    Args:
      workdir: gets `profile/`.
      first_step: steps done before the start.
      num_steps: how many steps to trace, 0 for none.
    """

    def __init__(self, workdir: epath.Path, *, first_step: int, num_steps: int):
        self._directory = workdir / "profile"
        self._steps = range(first_step + FIRST, first_step + FIRST + num_steps)
        self._running = False

    def __exit__(self, *_) -> None:
        if self._running:  # the run ended before
            self._stop()

    def before(self, step: int) -> None:
        """Starts the trace before its first step."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Ends the trace when its last step, of which these are the metrics, is computed."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        say(f"profile of steps {self._steps[0]} to {self._steps[-1]}: {self._directory}")
