r"""Trains a model as a config file says.

    python train.py --config configs/digits.py [--workdir DIR] [--config.KEY=VALUE ...]

Any key of the config can be set on the command line, as in --config.optimizer.learning_rate=0.05
or --config.model.k=8/3; None is none. --config FILE:ARGUMENT calls its get_config with ARGUMENT.
The work directory gets config.json, checkpoints/, metrics.jsonl, curves.png and TensorBoard's
events. Ctrl-C and SIGTERM save the step that is under way and stop; the same command again
continues.

On several hosts run it on each, with the same work directory. SLURM and TPU pods are detected;
elsewhere say who is who:

    python train.py --config CONFIG --workdir DIR \
        --coordinator_address=HOST:PORT --num_processes=N --process_id=I
"""

import os
import re
import signal
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from slimconv_jax.console import prepare_console
from slimconv_jax.devices import enable_compilation_cache
from slimconv_jax.errors import LIBRARY_ERRORS, InputError, exhausted
from slimconv_jax.files import absolute
from slimconv_jax.training.config import prepare_arguments
from slimconv_jax.training.hosts import initialize, is_lost_contact
from slimconv_jax.training.interruption import RunInterruptedError
from slimconv_jax.training.loop import train
from slimconv_jax.work_directory import list_checkpoints

config_flags.DEFINE_config_file(
    "config", help_string="The config file, such as configs/digits.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints and metrics go. Default: runs/NAME for configs/NAME.py.",
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where several processes train together."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
    "initialization_timeout", 300, "For how many seconds the processes wait for each other."
)
flags.mark_flag_as_required("config")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line, with a sentence where ml_collections has a traceback."""
    prepare_console()
    try:
        argv, nothing = prepare_arguments(argv)
    except InputError as error:
        sys.exit(f"error: {error}")
    sys.argv[:] = argv  # where ml_collections looks for overrides
    rest = app.parse_flags_with_usage(argv)
    flags.FLAGS["config"].value.update_from_flattened_dict(dict.fromkeys(nothing))
    if flags.FLAGS["verbosity"].using_default_value:
        # Else Orbax tells of every file it touches, and prints tracebacks of what it raises too.
        flags.FLAGS.verbosity = logging.FATAL
    return rest


def main(argv: list[str]) -> int | None:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Options begin with --")
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _report_unraisable
    config = flags.FLAGS["config"]
    file, _, argument = config.config_filename.partition(":")
    name = "-".join(filter(None, (Path(file).stem, re.sub(r"\W+", "-", argument))))
    workdir = _WORKDIR.value or f"runs/{name}"
    try:
        enable_compilation_cache()
        initialize(
            _COORDINATOR_ADDRESS.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            _INITIALIZATION_TIMEOUT.value,
        )
        train(config.value, workdir)
    except InputError as error:
        return _stop(f"error: {error}", 1)
    except RunInterruptedError as error:
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()  # all stop together, and none is to be missed
        return _stop(error, error.status)
    except KeyboardInterrupt as error:
        what = "nothing was saved"
        if list_checkpoints(absolute(workdir)):
            what = "the same command continues from the last checkpoint"
        return _stop(f"interrupted; {what}", 143 if isinstance(error, _Terminated) else 130)
    except LIBRARY_ERRORS as error:
        if reason := exhausted(error):
            return _stop(f"error: {reason} (also config.model.remat, step.accumulation_steps)", 1)
        if not is_lost_contact(error):
            raise
        reason = str(error).splitlines()[0]
        return _stop(
            f"error: lost contact with another process ({reason}); when all are there again, the "
            "same command continues from the last checkpoint",
            1,
        )
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as Ctrl-C."""


def _terminate(*_) -> None:
    raise _Terminated


def _report_unraisable(unraisable) -> None:
    # When a checkpoint cannot be written, which Orbax raises, what it has under way says this too.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _stop(message: object, status: int) -> int:
    """Ends the program with a message, at once where others might be waited for."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if status == 1 and not jax.distributed.is_initialized():
        return status
    # Everything is saved and closed. At an orderly exit, threads of XLA that still compile crash
    # the interpreter, and processes wait for each other.
    os._exit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
