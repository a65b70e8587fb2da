"""Trains a model as a config file says.

    python train.py --config configs/digits.py [--workdir DIR] [--config.KEY=VALUE ...]

Any key of the config can be set on the command line, as in --config.optimizer.learning_rate=0.05
or --config.model.k=8/3. The work directory gets config.json, checkpoints/ and metrics.jsonl. The
same command again continues an interrupted run from its last checkpoint.
"""

import itertools
import os
import re
import sys
from pathlib import Path

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from slimconv_jax.compilation_cache import enable_compilation_cache
from slimconv_jax.errors import InputError
from slimconv_jax.training.config import unknown_key
from slimconv_jax.training.loop import train

config_flags.DEFINE_config_file(
    "config", help_string="The config file, such as configs/digits.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints and metrics go. Default: runs/NAME for configs/NAME.py.",
)
flags.mark_flag_as_required("config")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line, with a sentence where ml_collections has a traceback."""
    try:
        _check_overrides(argv)
    except InputError as error:
        sys.exit(f"error: {error}")
    rest = app.parse_flags_with_usage(argv)
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # else Orbax tells of every file it touches
    return rest


def _check_overrides(argv: list[str]) -> None:
    """Loads the config without its overrides, and looks up the key of each in it."""
    is_override = [re.match(r"--?config\.", argument) is not None for argument in argv]
    plain = [argument for argument, skip in zip(argv, is_override, strict=True) if not skip]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=plain)
    try:
        values(plain, known_only=True)
    except flags.Error:
        return  # left to the parsing proper, which says it well
    except (AttributeError, SyntaxError) as error:
        raise InputError(f"the config file cannot be used: {error}") from None
    config = values["config"].value
    if config is None:
        return
    path = values["config"].config_filename
    if not Path(path).is_file():
        raise InputError(f"there is no config file {path!r}; configs/ holds some")
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path} is no config file: its get_config must return a ConfigDict")
    for argument in itertools.compress(argv, is_override):
        name = argument.lstrip("-").split("=")[0]
        section, where = config, "config"
        for key in re.sub(r"\[.*?\]", "", name).split(".")[1:]:
            if not isinstance(section, ConfigDict):
                raise InputError(f"{where} is a value, so there is no {name}")
            if key not in section:
                raise InputError(unknown_key(where, key, section))
            section, where = section[key], f"{where}.{key}"


def main(argv: list[str]) -> int | None:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Options begin with --")
    enable_compilation_cache()
    config = flags.FLAGS["config"]
    workdir = _WORKDIR.value or f"runs/{Path(config.config_filename).stem}"
    try:
        train(config.value, workdir)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        saved = any(epath.Path(workdir).expanduser().glob("checkpoints/[0-9]*"))
        what = (
            "the same command continues from the last checkpoint" if saved else "nothing was saved"
        )
        print(f"interrupted; {what}", file=sys.stderr)
        # Everything is saved and closed. At an orderly exit, threads of XLA that still compile
        # crash the interpreter.
        sys.stdout.flush()
        os._exit(130)
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
