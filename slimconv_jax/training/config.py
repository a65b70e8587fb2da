"""What a config may hold, checked before anything is built.

A section of a config is the keyword arguments of a function or two, so the functions
themselves say which keys there are.
"""

import difflib
import inspect
import itertools
import os
import re
import traceback
from collections.abc import Callable, Collection, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from slimconv_jax.data.loader import load_dataset
from slimconv_jax.data.sources import load_source, load_splits
from slimconv_jax.data.transforms import Transform
from slimconv_jax.errors import LIBRARY_ERRORS, InputError, require_integer
from slimconv_jax.models.zoo import create_model
from slimconv_jax.training.augment import augment, normalize
from slimconv_jax.training.optimizer import create_optimizer, create_schedule
from slimconv_jax.training.step import make_train_step

SECTIONS: dict[str, tuple[Collection[Callable], Collection[str]]] = {
    "model": ([create_model], ("num_classes", "rngs")),
    "dataset": ([load_splits, load_source], ("options", "split")),
    "transform": ([Transform], ()),
    "loader": ([load_dataset], ("source", "transform", "training", "sharding")),
    "normalize": ([normalize], ("images",)),
    "augment": ([augment], ("key", "images", "targets")),
    "optimizer": (
        [create_schedule, create_optimizer],
        ("learning_rate_fn", "batch_size", "steps_per_epoch", "total_steps"),
    ),
    "step": (
        [make_train_step],
        (
            *("model", "optimizer", "learning_rate_fn", "num_classes"),
            *("augment", "normalize", "key", "mesh"),
        ),
    ),
}
"""For each section, the functions that take its keys and their arguments that are not keys."""

INTEGERS = {
    "seed": (0, 2**32 - 1),
    "batch_size": (1, 2**20),
    "eval_batch_size": (1, 2**20),
    "num_epochs": (1, 10**5),
    "eval_every_epochs": (1, 10**5),
    "log_every_steps": (1, 2**31 - 1),
    "checkpoints_to_keep": (1, 10**5),
    "profile_steps": (0, 10**4),
}
"""The keys outside the sections that are integers, with their smallest and largest values.

There is one more, `init_from`, a path or None.
"""


def read_config(path: os.PathLike | str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """The config of a file, changed as on the command line of train.py.

    Args:
      path: a file in `configs/`, also FILE:ARGUMENT for what its get_config is called with.
      overrides: such as "--config.model.k=8/3"; "None" is None.

    Raises:
      ValueError: if the file has no such key, or the key no such value.
    """
    command, nothing = prepare_arguments(["train.py", f"--config={path}", *overrides])
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
        values(command)
    except (TypeError, ValueError, flags.Error) as error:
        reason = "; ".join(str(error).splitlines())
        raise InputError(f"{os.path.relpath(path)} cannot be used: {reason}") from None
    config = values["config"].value
    config.update_from_flattened_dict(dict.fromkeys(nothing))
    return config


def prepare_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line with a config, checked and made ready for ml_collections.

    Args:
      argv: as of train.py.

    Returns:
      The command line with the files of --flagfile in place, less the overrides with None, of which
      ml_collections makes a string or an error; and the keys of these, such as "model.k".

    Raises:
      ValueError: if the config has no such key, or there is no such config.
    """
    try:
        argv = flags.FlagValues().read_flags_from_files(list(argv), force_gnu=False)
    except (flags.Error, UnicodeDecodeError) as error:
        raise InputError(f"the file of --flagfile cannot be read: {error}") from None
    # Editors on Windows put a byte-order mark before the first line of a file.
    argv = [a.removeprefix("\ufeff") for a in argv if not a.startswith("\ufeff#")]
    _check_overrides(argv)
    kept, nothing = [], {}
    arguments = iter(itertools.pairwise([*argv, ""]))
    for argument, following in arguments:
        # --config.KEY=VALUE, or the same in two arguments.
        override = re.fullmatch(r"--?config\.([^=]+)(=.*)?", argument, re.DOTALL)
        if override is None:
            kept.append(argument)
            continue
        key, value = override[1], (override[2] or f"={following}")[1:]
        nothing.pop(key, None)
        if value not in ("None", "none"):
            kept.append(argument)
            continue
        if "[" in key:
            raise InputError(f"config.{key} cannot be None; the whole of it can be set in the file")
        nothing[key] = None
        if not override[2]:
            next(arguments, None)
    return kept, list(nothing)


def _check_overrides(argv: Sequence[str]) -> None:
    """Loads the config of a command line without its overrides, and looks up the key of each in it.

    Raises:
      ValueError: if the config has no such key, or there is no such config.
    """
    is_override = [re.match(r"--?config\.", argument) is not None for argument in argv]
    plain = [argument for argument, skip in zip(argv, is_override, strict=True) if not skip]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=plain)
    try:
        values(plain, known_only=True)
    except flags.Error as error:
        if "Traceback" not in str(error):
            return  # left to the parsing proper, which says it well
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"the config file {_config_of(plain)} cannot be used: {reason}") from None
    except LIBRARY_ERRORS as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        reason = f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        if isinstance(error, SyntaxError):
            reason = str(error)
        if "has no attribute 'get_config'" in reason:
            reason = "it has no function get_config"
        raise InputError(f"the config file {_config_of(plain)} cannot be used: {reason}") from None
    config = values["config"].value
    if config is None:
        return
    path = values["config"].config_filename.partition(":")[0]
    if not os.path.isfile(path):
        raise InputError(
            f"there is no config file {os.path.abspath(path)}; the clone of slimconv_jax has some, "
            "in configs/"
        )
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"{path} is no config file: its get_config must return a ConfigDict")
    for argument in itertools.compress(argv, is_override):
        name = argument.lstrip("-").split("=")[0]
        section, where = config, "config"
        for key in re.sub(r"\[.*?\]", "", name).split(".")[1:]:
            if not isinstance(section, ml_collections.ConfigDict):
                raise InputError(f"{where} is a value, so there is no {name}")
            if key not in section:
                allowed = section_keys(where[7:]) if where[7:] in SECTIONS else section
                if key in allowed:
                    raise InputError(
                        f"{where}.{key} is not set in {path}; to use it, add it to the file"
                    )
                raise InputError(unknown_key(where, key, allowed))
            section, where = section[key], f"{where}.{key}"


def _config_of(argv: Sequence[str]) -> str:
    """What a command line has for --config."""
    for argument, following in itertools.pairwise([*argv, ""]):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    return ""


def check_config(config: ml_collections.ConfigDict, num_devices: int) -> None:
    """Checks keys and numbers of a training config.

    Args:
      config: as a file in `configs/` returns it.
      num_devices: over how many devices a batch is split.

    Raises:
      ValueError: if a key is unknown or missing, or a number is out of range.
    """
    _check_keys("config", config, required=[*SECTIONS, *INTEGERS, "init_from"])
    for section in SECTIONS:
        if not isinstance(config[section], ml_collections.ConfigDict):
            raise InputError(f"config.{section} must be a section, that is a ConfigDict")
        parameters = section_keys(section)
        required = [name for name, p in parameters.items() if p.default is p.empty]
        _check_keys(f"config.{section}", config[section], required, optional=parameters)
    for key, bounds in INTEGERS.items():
        require_integer(f"config.{key}", config[key], *bounds)
    if not isinstance(config.init_from, str | None) or config.init_from == "":
        raise InputError(f"config.init_from={config.init_from!r} must be a path or None")
    parts = config.step.get("accumulation_steps", 1)
    require_integer("config.step.accumulation_steps", parts, 1)
    if config.batch_size % (num_devices * parts):
        each = f", each in {parts} parts" if parts > 1 else ""
        raise InputError(
            f"config.batch_size={config.batch_size} does not divide over {num_devices} "
            f"devices{each}; it must be a multiple of {num_devices * parts}"
        )


def section_keys(section: str) -> dict[str, inspect.Parameter]:
    """The keys that a section may have."""
    functions, not_keys = SECTIONS[section]
    return {
        name: parameter
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in not_keys
    }


def arguments(section: ml_collections.ConfigDict, function: Callable) -> dict:
    """Those keys of a section that are arguments of a function."""
    names = inspect.signature(function).parameters
    return {key: value for key, value in section.items() if key in names}


def _check_keys(
    where: str,
    section: ml_collections.ConfigDict,
    required: Collection[str],
    optional: Collection[str] = (),
) -> None:
    allowed = dict.fromkeys([*required, *optional])
    for key in section:
        if key not in allowed:
            raise InputError(unknown_key(where, key, allowed))
    for key in required:
        if key not in section:
            raise InputError(f"{where} lacks the key {key!r}")


def unknown_key(where: str, key: str, allowed: Collection[str]) -> str:
    """The sentence about a key that a section of a config does not have."""
    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{where} has no key {key!r}{hint}; its keys are: {', '.join(allowed) or 'none'}"
