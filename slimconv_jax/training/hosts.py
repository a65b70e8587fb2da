"""Connects several processes, on one or many hosts, into one training run."""

import contextlib
import faulthandler
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from slimconv_jax.console import console
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.training.loggers import PATIENCE
from slimconv_jax.training.rendezvous import meet


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    initialization_timeout: int = 300,
) -> None:
    """Connects this process with the others, if there are any. Call it before any use of JAX.

    Processes that SLURM or a TPU pod started find each other. Only the first one prints.

    Args:
      coordinator_address: "HOST:PORT" of the first process, the same for all. Give all three
        arguments where nothing is detected, or none.
      num_processes: the number of processes.
      process_id: of this process, from 0.
      initialization_timeout: how many seconds to wait for the others.

    Raises:
      ValueError: if the arguments do not fit together, or the others are not there in time.
    """
    given = (coordinator_address, num_processes, process_id)
    if None in given and any(value is not None for value in given):
        raise InputError(
            "of --coordinator_address, --num_processes and --process_id give all three, or none"
        )
    require_integer("--initialization_timeout", initialization_timeout, 1)
    method = None
    if None not in given:
        require_integer("--num_processes", num_processes, 1)
        if not 0 <= process_id < num_processes:
            raise InputError(
                f"--process_id={process_id} must be from 0 to {num_processes - 1}, one less than "
                "--num_processes"
            )
        meet(*given, seconds=initialization_timeout)
        method = "deactivate"
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in os.environ:
        method = "slurm"
    elif importlib.util.find_spec("libtpu") is None:
        return
    # For CPUs only; other devices have collectives of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            *given,
            cluster_detection_method=method,
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=60,
            shutdown_timeout_seconds=round(PATIENCE) + 30,  # the first one waits for its loggers
        )
    except ValueError as error:
        if method or "coordinator_address" not in str(error):
            raise InputError(f"the processes cannot be connected: {error}") from None
        return  # a single TPU host
    except RuntimeError as error:  # others did not come, the address is taken, ...
        line = str(error).splitlines()[0]
        raise InputError(f"the processes cannot be connected: {line}") from None
    console.quiet = jax.process_index() > 0
    # When the first process is gone, JAX aborts the others with a message, which the stacks of all
    # threads, from Python's fault handler, would hide.
    faulthandler.disable()


def on_first(function: Callable[[], int | None]) -> int | None:
    """Calls a function on the first process only, and returns its result on all of them.

    Raises:
      ValueError: on the first process as the function does, on the others because it did.
    """
    if jax.process_count() == 1:
        return function()
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = function()
        except Exception as error:  # of any kind; it is raised below, when all know of it
            failure = error
    message = np.array([failure is not None, result or 0], np.int32)
    failed, number = multihost_utils.broadcast_one_to_all(message).tolist()
    if failure is not None:
        raise failure
    if failed:
        raise InputError("stopped, since the first process cannot go on; it says why")
    return number


class Comparison(contextlib.AbstractContextManager):
    """Checks that all processes of a run are about to do the same.

    Use as a context manager around everything before the comparison: an InputError there is sent
    to the others, which would otherwise wait for this process.
    """

    def __init__(self):
        self._is_over = jax.process_count() == 1

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, InputError) and not self._is_over:
            self._exchange({"failure": str(error)})

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Compares facts with those of the other processes; does nothing after the first call.

        Args:
          facts: what must be the same everywhere, by name; the values must be JSON values.

        Raises:
          ValueError: on all processes, with what differs, and where.
        """
        if self._is_over:
            return
        self._is_over = True
        answers = self._exchange({"facts": facts})
        for number, answer in enumerate(answers):
            if "failure" in answer:
                raise InputError(f"process {number} cannot go on: {answer['failure']}")
        first, *others = [answer["facts"] for answer in answers]
        for number, other in enumerate(others, 1):
            differences = [
                f"{name} is {first.get(name, 'absent')!r} in process 0 and "
                f"{other.get(name, 'absent')!r} in process {number}"
                for name in first | other
                if first.get(name, "absent") != other.get(name, "absent")
            ]
            if differences:
                raise InputError(
                    f"the processes of this run do not do the same: {'; '.join(differences)}"
                )

    @staticmethod
    def _exchange(message: dict) -> list[dict]:
        """Returns the messages of all processes."""
        text = np.frombuffer(json.dumps(message).encode(), np.uint8)
        longest = multihost_utils.process_allgather(np.array(len(text))).max()
        padded = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
        return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def is_lost_contact(error: Exception) -> bool:
    """Returns whether an error of JAX's runtime means that another process is gone."""
    signs = ("gloo", "nccl", "unavailable", "deadline_exceeded", "aborted", "heartbeat", "barrier")
    return jax.process_count() > 1 and any(sign in str(error).lower() for sign in signs)
