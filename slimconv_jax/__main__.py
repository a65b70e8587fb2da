"""The command line: `slimconv COMMAND`, also `python -m slimconv_jax COMMAND`."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from slimconv_jax import __version__
from slimconv_jax.commands.options import expand_flag_files
from slimconv_jax.console import ctrl_c_held_back, exit_status, prepare_console
from slimconv_jax.errors import InputError

COMMANDS = (
    *("train", "slim", "convert", "evaluate", "predict", "export"),
    *("list", "summary", "benchmark", "plan"),
)
"""Each is a module in `commands`, with `HELP`, `add_arguments(parser)` and `run(args)`."""

_GO_ON_UNREAD = ("train", "slim", "convert")
"""The commands whose purpose is what they write, not what they print."""


def main(argv: Sequence[str] | None = None, *, command: str | None = None) -> int:
    """Runs a command; returns the exit status.

    Args:
      argv: the arguments; None for those of the process.
      command: the command of a script; None if the first argument names it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prepare_console(needs_stdout=(command or next(iter(argv), "")) not in _GO_ON_UNREAD)
    prog = os.path.basename(sys.argv[0]) if command else "slimconv"
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog=prog, **style)
    parser.add_argument("--version", action="version", version=__version__)
    if command:
        _add_command(parser, command)
    else:
        parser.description = importlib.import_module("slimconv_jax").__doc__
        parsers = parser.add_subparsers(required=True, metavar="COMMAND")
        for name in COMMANDS:
            about = importlib.import_module(f"slimconv_jax.commands.{name}").HELP
            _add_command(parsers.add_parser(name, help=about, description=about, **style), name)
    try:
        argv = expand_flag_files(argv)
    except InputError as error:
        parser.exit(1, f"error: {error}\n")
    args, rest = parser.parse_known_args(argv)
    if rest and not args.takes_overrides:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = rest
    args.command_line = ["slimconv", *([command] if command else []), *argv]
    return exit_status(lambda: _run(args), interrupted=args.interrupted, extra=args.extra)


def _run(args: argparse.Namespace) -> int | None:
    with ctrl_c_held_back():  # JAX does not survive Ctrl-C while it is imported
        importlib.import_module("jax")
    return args.run(args)


def _add_command(parser: argparse.ArgumentParser, name: str) -> None:
    module = importlib.import_module(f"slimconv_jax.commands.{name}")
    defaults = {"interrupted": "interrupted", "takes_overrides": False, "extra": "train"}
    parser.set_defaults(run=module.run, parser=parser, **defaults)
    module.add_arguments(parser)


if __name__ == "__main__":
    sys.exit(main())
