"""Turns SIGTERM, SIGHUP and Ctrl-C into a flag that the loop checks after each step."""

import contextlib
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class RunInterruptedError(Exception):
    """A run was asked to stop, and its state is saved.

    Args:
      name: "SIGTERM", "SIGHUP" or "Ctrl-C".
      step: the step that is saved.

    Attributes:
      status: the exit status that shells expect.
    """

    def __init__(self, name: str, step: int):
        super().__init__(f"stopped by {name}; step {step} is saved, the same command continues")
        (self.status,) = (128 + number for number, other in _NAMES.items() if other == name)


class StopSignal:
    """Holds back SIGTERM, SIGHUP and the first Ctrl-C while a run goes on.

    Use as a context manager. SIGHUP, which a closing terminal sends, stays ignored where it is
    ignored, as under nohup. A second signal has its usual effect, at once. With several processes,
    a signal to any of them stops all at the same step, one or two seconds later: JAX's preemption
    service agrees on the step. There, JAX holds back every SIGTERM.

    Attributes:
      name: the signal, as in `RunInterruptedError`; None as long as `requested` returns False.
    """

    def __init__(self):
        self.name: str | None = None
        self._received: str | None = None
        self._previous = {}
        self._together = jax.process_count() > 1
        self._asked = 0

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # only there is it possible
            for number in _NAMES:
                is_jaxs = number == signal.SIGTERM and self._together
                is_ignored = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
                if not is_jaxs and not is_ignored:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """Restores the usual effect of the signals."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        self._let_go()
        self._received = _NAMES[number]
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # a terminal that is gone
                os.write(2, b"\nstopping after the current step; Ctrl-C again stops at once\n")
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)  # for JAX, which notifies the others

    def requested(self) -> bool:
        """Returns whether to save and stop now; all processes must call it equally often."""
        if self.name is None and not self._together:
            self.name = self._received
        elif self.name is None:
            self._asked += 1  # from 1 on without a gap, since JAX agrees on the next number
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self.name = self._received or "SIGTERM"
        return self.name is not None
