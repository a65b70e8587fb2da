"""`train`: trains a model as a config says."""

import argparse
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from slimconv_jax.errors import LIBRARY_ERRORS, InputError, exhausted

HELP = "train a model as a config says"

_DESCRIPTION = """Trains a model as a config says.

The work directory gets config.json, checkpoints/, metrics.jsonl, curves.png and TensorBoard's
events. After Ctrl-C or SIGTERM, the run saves its current step and stops; the same command
continues it.

Every key of the config can be set on the command line, as in --config.optimizer.learning_rate=0.05
or --config.model.k=8/3; None unsets a key. --help-config lists the keys. --flagfile FILE reads
options from a file, one per line.

On several hosts, run the command on each, with the same work directory. SLURM and TPU pods are
detected; elsewhere, use --coordinator_address, --num_processes and --process_id.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `train`."""
    parser.usage = "%(prog)s --config CONFIG [--workdir DIR] [options] [--config.KEY=VALUE ...]"
    parser.description = _DESCRIPTION
    parser.set_defaults(takes_overrides=True, interrupted="interrupted; nothing was saved")
    add = parser.add_argument
    add(
        "--config",
        required=True,
        help="a config file, or the name of one that comes with this package, such as digits; "
        "NAME:ARGUMENT calls its get_config with ARGUMENT, as in imagenet:sc_resnet101",
    )
    add("--workdir", metavar="DIR", help="checkpoints and metrics (default: runs/NAME for a NAME)")
    add(
        "--help-config",
        "--help_config",
        action="store_true",
        help="list the keys of the config, with their values, defaults and meanings",
    )
    group = parser.add_argument_group("several processes")
    add = group.add_argument
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    add("--num_processes", type=int, metavar="N", help="how many processes there are")
    add("--process_id", type=int, metavar="I", help="the number of this process, from 0")
    add(
        "--initialization_timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long the processes wait for each other (default: 300)",
    )


def run(args: argparse.Namespace) -> int:
    """Trains; returns the exit status."""
    file, _, argument = args.config.partition(":")
    name = "-".join(filter(None, (Path(file).stem, re.sub(r"\W+", "-", argument))))
    workdir = args.workdir or f"runs/{name}"
    return supervise(lambda: _train(args, workdir), workdir)


def _train(args: argparse.Namespace, workdir: str) -> None:
    from slimconv_jax.training.config import describe_keys, read_config
    from slimconv_jax.training.hosts import initialize
    from slimconv_jax.training.loop import train

    config = read_config(args.config, args.overrides)
    if args.help_config:
        print("\n".join(describe_keys(config, shutil.get_terminal_size().columns)))
        return
    initialize(
        args.coordinator_address,
        args.num_processes,
        args.process_id,
        args.initialization_timeout,
    )
    train(config, workdir)


def supervise(start: Callable[[], None], workdir: str) -> int:
    """Calls a function that trains in a work directory; returns the exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _supervise(start)
    except KeyboardInterrupt as error:
        what = "nothing was saved"
        there = Path(workdir).expanduser()
        if any(path.name.isdigit() for path in there.glob("checkpoints/*")):
            what = "the same command continues from the last checkpoint"
        elif (there / "slim.json").exists():
            what = "the same command continues after the imitation"
        _leave(f"interrupted; {what}", 143 if isinstance(error, _Terminated) else 130)


def _supervise(start: Callable[[], None]) -> int:
    # Imported here since they take seconds, during which Ctrl-C should print one sentence.
    import absl.logging
    import jax

    from slimconv_jax.devices import enable_compilation_cache
    from slimconv_jax.training.hosts import is_lost_contact
    from slimconv_jax.training.interruption import RunInterruptedError

    # Else Orbax logs every file it touches, and prints tracebacks of errors that it also raises.
    absl.logging.set_verbosity(absl.logging.FATAL)
    enable_compilation_cache()
    try:
        start()
        return 0
    except InputError as error:
        message, status = f"error: {error}", 1
    except RunInterruptedError as error:
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()  # all stop together, so none reports another as lost
        message, status = str(error), error.status
    except LIBRARY_ERRORS as error:
        status = 1
        if reason := exhausted(error):
            message = f"error: {reason} (also config.model.remat, step.accumulation_steps)"
        elif is_lost_contact(error):
            reason = str(error).splitlines()[0]
            message = (
                f"error: lost contact with another process ({reason}); when all are back, the same "
                "command continues from the last checkpoint"
            )
        else:
            raise
    if status == 1 and not jax.distributed.is_initialized():
        raise InputError(message.removeprefix("error: "))
    # An orderly exit would crash in threads of XLA that still compile, and would wait for the
    # other processes.
    return _leave(message, status)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, treated like Ctrl-C."""


def _terminate(*_) -> None:
    raise _Terminated


def _leave(message: str, status: int) -> int:
    """Prints a message and ends the process at once; everything is saved and closed by now."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
