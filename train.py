"""Trains a model as a config file says.

    python train.py --config configs/digits.py [--workdir DIR] [--config.KEY=VALUE ...]

Any key of the config can be set on the command line, as in --config.optimizer.learning_rate=0.05
or --config.model.k=8/3. The work directory gets config.json, checkpoints/ and metrics.jsonl. The
same command again continues an interrupted run from its last checkpoint.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
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
flags.FLAGS.set_default("verbosity", logging.WARNING)  # else Orbax tells of each file it touches


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line, with a sentence where ml_collections has a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, OSError):
        try:
            _explain_overrides(argv)
        except InputError as error:
            sys.exit(f"error: {error}")
        raise


def _explain_overrides(argv: list[str]) -> None:
    """Raises an InputError for the first --config.KEY=VALUE whose key does not exist."""
    config = _loaded_config()
    for argument in argv[1:]:
        name = argument.lstrip("-").split("=")[0]
        if not name.startswith("config."):
            continue
        section, where = config, "config"
        for key in name.split(".")[1:]:
            if not isinstance(section, ConfigDict):
                raise InputError(f"{where} is a value, so there is no {name}")
            if key not in section:
                raise InputError(unknown_key(where, key, section))
            section, where = section[key], f"{where}.{key}"


def _loaded_config() -> ConfigDict:
    config = flags.FLAGS["config"].value  # there even if parsing failed
    if not isinstance(config, ConfigDict):
        raise InputError(f"cannot load a config from {_config_file()}; configs/ holds some")
    return config


def _config_file() -> Path:
    return Path(config_flags.get_config_filename(flags.FLAGS["config"]))


def main(argv: list[str]) -> int | None:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Options begin with --")
    enable_compilation_cache()
    workdir = _WORKDIR.value or f"runs/{_config_file().stem}"
    try:
        train(_loaded_config(), workdir)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
