"""Defines the keys of a config, reads config files, and applies the command line's overrides.

The keys of a section are the keyword-only arguments of one or two functions, and the keys outside
the sections are the fields of `Run`. So the functions themselves define which keys exist, with
their defaults and meanings. A config file sets those that differ.
"""

import collections
import dataclasses
import difflib
import inspect
import itertools
import json
import os
import re
import runpy
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_dict, config_flags

import slimconv_jax
from slimconv_jax.data.datasets import load_source, load_splits
from slimconv_jax.data.loader import load_dataset
from slimconv_jax.data.preprocessing import normalize
from slimconv_jax.data.transforms import Transform
from slimconv_jax.errors import (
    LIBRARY_ERRORS,
    InputError,
    require_choice,
    require_integer,
    require_number,
)
from slimconv_jax.files import absolute
from slimconv_jax.models.zoo import create_model, named_config
from slimconv_jax.signatures import keys_of, meanings, type_of
from slimconv_jax.storage.work_directory import CONFIG, read_recorded_config
from slimconv_jax.training.augment import augment
from slimconv_jax.training.distillation import create_teacher
from slimconv_jax.training.loggers import check_loggers
from slimconv_jax.training.loss import create_loss
from slimconv_jax.training.optimizer import (
    arguments_of,
    create_optimizer,
    create_schedule,
    find_optimizers,
)
from slimconv_jax.training.regularization import draw_scales
from slimconv_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The keys of a config outside its sections.

    Attributes:
      seed: of all random numbers: initial parameters, order of the images, augmentation.
      init_from: a saved model to start from, a directory of `convert` or of another run; None for
        random parameters.
      batch_size: images of a step, on all devices together.
      eval_batch_size: images of a step of evaluation, on all devices together.
      num_epochs: how often each training image is seen.
      eval_every_epochs: epochs from one evaluation to the next; each writes a checkpoint.
      checkpoint_every_steps: steps from one checkpoint to the next, besides those of the
        evaluations; 0 for no others.
      checkpoint_every_minutes: likewise in minutes, checked every `log_every_steps`; 0 for no
        others.
      checkpoints_to_keep: how many of the newest checkpoints are kept, besides the best.
      loggers: where metrics go besides the work directory: "tensorboard", "wandb", "mlflow".
      log_every_steps: steps that a line of training metrics averages over.
      profile_steps: how many steps to trace for a profiler; 0 for none.
    """

    seed: int = 0
    init_from: str | None = None
    batch_size: int
    eval_batch_size: int = 256
    num_epochs: int
    eval_every_epochs: int = 1
    checkpoint_every_steps: int = 0
    checkpoint_every_minutes: float = 0.0
    checkpoints_to_keep: int = 2
    loggers: Sequence[str] = ("tensorboard",)
    log_every_steps: int = 100
    profile_steps: int = 0

    def __post_init__(self):
        for name, least, most in (
            ("seed", 0, 2**32 - 1),
            ("batch_size", 1, 2**20),
            ("eval_batch_size", 1, 2**20),
            ("num_epochs", 1, 10**5),
            ("eval_every_epochs", 1, 10**5),
            ("checkpoint_every_steps", 0, 2**31 - 1),
            ("checkpoints_to_keep", 1, 10**5),
            ("log_every_steps", 1, 2**31 - 1),
            ("profile_steps", 0, 10**4),
        ):
            require_integer(f"config.{name}", getattr(self, name), least, most)
        require_number("config.checkpoint_every_minutes", self.checkpoint_every_minutes, least=0)
        check_loggers(self.loggers)
        if not isinstance(self.init_from, str | None) or self.init_from == "":
            raise InputError(f"config.init_from={self.init_from!r} must be a path or None")


SECTIONS: dict[str, Sequence[Callable]] = {
    "": (Run,),
    "model": (create_model,),
    "dataset": (load_source, load_splits),
    "transform": (Transform,),
    "loader": (load_dataset,),
    "normalize": (normalize,),
    "augment": (augment,),
    "optimizer": (create_schedule, create_optimizer),
    "step": (create_loss, draw_scales, make_train_step),
    "distillation": (create_teacher,),
}
"""For each section, the functions whose keyword-only arguments are its keys.

"" is the config itself, outside its sections.
"""


def keys(where: str, section: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """Returns the keys that a section may have.

    Those of "optimizer" are also the arguments of the optimiser that it names.
    """
    found = {name: p for function in SECTIONS[where] for name, p in keys_of(function).items()}
    if where == "optimizer":
        found |= arguments_of(section.get("name") or found["name"].default)
    return found


def _section(config: ml_collections.ConfigDict, where: str) -> tuple[Any, str]:
    """Returns a section of a config, and its name in messages."""
    return (config[where], f"config.{where}") if where else (config, "config")


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a copy of a config that has every key; those that it lacks have their defaults.

    A key without a default becomes None.

    Raises:
      ValueError: if it is not a config.
    """
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"a config is a ConfigDict, as read_config returns, not {config!r}")
    config = ml_collections.ConfigDict(config)  # copies the sections, too
    with config.unlocked():
        for where in SECTIONS:
            if where and where not in config:
                config[where] = ml_collections.ConfigDict()
            section, _ = _section(config, where)
            if not isinstance(section, ml_collections.ConfigDict):
                continue  # `check_config` reports it
            for name, parameter in keys(where, section).items():
                default = parameter.default
                if default in (None, parameter.empty):
                    default = config_dict.placeholder(type_of(parameter))
                if name not in section:
                    section[name] = default
    return config


def default_values() -> dict:
    """Returns the sections and keys of a config with their defaults, as JSON has them."""
    return json.loads(complete(ml_collections.ConfigDict()).to_json_best_effort())


def check_config(config: ml_collections.ConfigDict, num_devices: int) -> None:
    """Checks the keys and numbers of a training config.

    Args:
      config: from `complete`.
      num_devices: the devices that a batch is split over.

    Raises:
      ValueError: if a key is unknown or missing, or a number is out of range.
    """
    check_sections(config)
    missing = []
    for where in SECTIONS:
        section, name = _section(config, where)
        allowed = [*keys(where, section), *(() if where else filter(None, SECTIONS))]
        unknown = [key for key in section if key not in allowed]
        if where == "optimizer":
            unknown = [key for key in unknown if section[key] is not None]
        if unknown:
            raise unknown_key(name, unknown[0], allowed)
        for key, parameter in keys(where, section).items():
            if parameter.default is parameter.empty and section[key] is None:
                missing.append(f"{name}.{key}")
    if missing:
        raise InputError(f"the config lacks {', '.join(missing)}; --help-config lists all keys")
    named_config(config.model.name)
    Run(**{key: config[key] for key in keys("", config)})
    parts = config.step.accumulation_steps
    require_integer("config.step.accumulation_steps", parts, 1)
    if config.batch_size % (num_devices * parts):
        each = f", each in {parts} parts" if parts > 1 else ""
        raise InputError(
            f"config.batch_size={config.batch_size} does not divide over {num_devices} "
            f"devices{each}; it must be a multiple of {num_devices * parts}"
        )


def check_sections(config: ml_collections.ConfigDict) -> None:
    """Checks that the sections of a config are some, and that there is such an optimiser.

    Raises:
      ValueError: if not.
    """
    for where in filter(None, SECTIONS):
        if not isinstance(config[where], ml_collections.ConfigDict):
            raise InputError(f"config.{where} must be a section, that is, a ConfigDict")
    _check_optimizer(config.optimizer)


def _check_optimizer(section: ml_collections.ConfigDict) -> None:
    """Checks the name of an optimiser, and that it is given no arguments of others but None."""
    require_choice("config.optimizer.name", section.name, sorted(find_optimizers()))
    theirs = {key for name in find_optimizers() for key in arguments_of(name)}
    for key in sorted(theirs - arguments_of(section.name).keys()):
        if section.get(key) is not None:
            raise InputError(
                f"config.optimizer.{key}: {section.name} has no {key}; it has "
                f"{', '.join(arguments_of(section.name))}, and the others must be None"
            )


def unknown_key(where: str, key: str, allowed: Collection[str]) -> InputError:
    """Returns the error for a key that a section of a config does not have."""
    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return InputError(f"{where} has no key {key!r}{hint}; its keys are: {', '.join(allowed)}")


def read_config(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Reads the config of a file, completes it, and applies overrides.

    Args:
      path: a config file, or the name of one that comes with this package, such as "digits". With
        :ARGUMENT after it, get_config is called with ARGUMENT.
      overrides: such as "--config.model.k=8/3"; "None" is None.

    Raises:
      ValueError: if the config or a key does not exist, or a value is not allowed.
    """
    return override(_load(path), overrides, of=path)


def override(
    config: ml_collections.ConfigDict, overrides: Sequence[str], *, of: str
) -> ml_collections.ConfigDict:
    """Completes a config and applies overrides.

    Args:
      config: as `get_config` returns it; it may change.
      overrides: see `read_config`, also for errors.
      of: where the config is from, for messages.
    """
    if name := value_in(overrides, "optimizer.name"):  # which has keys of its own
        with config.unlocked():
            if "optimizer" not in config:
                config.optimizer = ml_collections.ConfigDict()
            if isinstance(config.optimizer, ml_collections.ConfigDict):
                config.optimizer.name = name
    config = complete(config)
    arguments, nothing = _split_overrides(config, overrides)
    parsed = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=parsed, sys_argv=arguments)
        _, *rest = parsed(arguments)
    except (flags.Error, IndexError, TypeError, ValueError, SyntaxError) as error:
        reason = "; ".join(str(error).splitlines())
        raise InputError(f"the config {of} cannot be changed like this: {reason}") from None
    if rest:
        raise InputError(f"unknown argument {rest[0]!r}; options begin with --")
    config.update_from_flattened_dict(nothing)
    return config


def read_run_config(workdir: epath.PathLike) -> ml_collections.ConfigDict | None:
    """Reads the config of a training run, and completes it; returns None if there is none.

    Raises:
      ValueError: if the file is damaged.
    """
    if (recorded := read_recorded_config(workdir)) is None:
        return None
    try:
        config = complete(ml_collections.ConfigDict(_as_tuples(recorded)))
        check_sections(config)
    except LIBRARY_ERRORS as error:
        place = absolute(workdir) / CONFIG
        raise InputError(f"{place} is damaged: it is not a config ({error})") from None
    return config


def _as_tuples(tree: Any) -> Any:
    """Returns what JSON has as configs have it: tuples for lists, and nothing for null."""
    if isinstance(tree, dict):
        return {key: _as_tuples(value) for key, value in tree.items() if value is not None}
    return tuple(map(_as_tuples, tree)) if isinstance(tree, list) else tree


def value_in(overrides: Sequence[str], key: str) -> str | None:
    """Returns the value that overrides give a key, if they do."""
    value = None
    for text, following in itertools.pairwise([*overrides, ""]):
        if match := re.fullmatch(rf"--?config\.{re.escape(key)}(?:=(.*))?", text, re.DOTALL):
            value = following if match[1] is None else match[1]
    return value


def _split_overrides(
    config: ml_collections.ConfigDict, overrides: Sequence[str]
) -> tuple[list[str], dict[str, None]]:
    """Splits overrides into a command line of those with values, and the keys that become None.

    ml_collections would turn None into a string or an error.
    """
    values, nothing = [""], {}
    arguments = iter(itertools.pairwise([*overrides, ""]))
    for argument, following in arguments:
        # --config.KEY=VALUE, --config.KEY VALUE, or for a boolean --config.KEY and --noconfig.KEY.
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(=.*)?", argument, re.DOTALL)
        if match is None:
            raise InputError(f"unknown argument {argument!r}; --config.KEY=VALUE changes a config")
        negated, key, value = match.groups()
        _find(config, key)
        if value is None and following and not following.startswith("--"):
            value = f"={following}"
            next(arguments)
        elif value is None and not negated and not _is_boolean(config, key):
            raise InputError(f"--config.{key} needs a value")
        nothing.pop(key, None)
        if value not in ("=None", "=none"):
            values.append(f"--{negated or ''}config.{key}{value or ''}")
        elif "[" in key:
            raise InputError(f"config.{key} cannot be None; the whole of it can be set in the file")
        else:
            nothing[key] = None
    return values, nothing


def _is_boolean(config: ml_collections.ConfigDict, key: str) -> bool:
    """Returns whether a key, such as "augment.flip", is True or False."""
    where, _, name = key.rpartition(".")
    parameter = keys(where, _section(config, where)[0]).get(name) if where in SECTIONS else None
    return parameter is not None and type_of(parameter) is bool


def _find(config: ml_collections.ConfigDict, key: str) -> None:
    """Checks that a config has a key, such as "model.k" or "milestones[0]"."""
    section, where = config, "config"
    for part in key.split("."):
        name, bracket, _ = part.partition("[")
        if not isinstance(section, ml_collections.ConfigDict):
            raise InputError(f"{where} is a value, so there is no config.{key}")
        if name not in section:
            raise unknown_key(where, name, list(section))
        section, where = section[name], f"{where}.{name}"
        if bracket and isinstance(section, ml_collections.ConfigDict):
            raise InputError(f"{where} is a section, so there is no config.{key}")


def shipped_configs() -> dict[str, Path]:
    """Returns the config files that come with this package, by name."""
    package = Path(slimconv_jax.__file__).parent
    # In a clone they lie beside the package.
    files = sorted(package.glob("configs/*.py")) or sorted(package.parent.glob("configs/*.py"))
    return {path.stem: path for path in files if path.stem != "__init__"}


def _load(path: str) -> ml_collections.ConfigDict:
    """Runs a config file and returns the config that its get_config builds; see `read_config`."""
    file, colon, argument = os.fspath(path).partition(":")
    file = os.fspath(shipped_configs().get(file, file))
    if not os.path.isfile(file):
        what = "is a directory, not a config file" if os.path.isdir(file) else "is not there"
        raise InputError(
            f"the config {os.path.abspath(file)} {what}; those that come with slimconv_jax are: "
            f"{', '.join(shipped_configs())}"
        )
    try:
        module = runpy.run_path(file)
        if "get_config" not in module:
            raise InputError("it has no function get_config")
        config = module["get_config"](*([argument] if colon else []))
    except LIBRARY_ERRORS as error:
        reason = error
        if not isinstance(error, SyntaxError | InputError):
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f" (line {frame.lineno})" for frame in frames if frame.filename == file]
            reason = f"{type(error).__name__}: {error}{lines[-1] if lines else ''}"
        raise InputError(f"the config file {file} cannot be used: {reason}") from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"{file} is not a config file: its get_config must return a ConfigDict")
    return config


def describe_keys(config: ml_collections.ConfigDict, width: int) -> Iterator[str]:
    """Yields the lines of `--help-config`: each key with its value, its default and its meaning.

    Args:
      config: from `read_config`.
      width: characters in a line.
    """
    indent = {"initial_indent": "    ", "subsequent_indent": "    "}
    for where, functions in SECTIONS.items():
        section, prefix = _section(config, where)
        said = collections.ChainMap(*map(meanings, functions))
        if where == "optimizer":
            said = said.new_child(meanings(find_optimizers()[section.name]))
        for name, parameter in keys(where, section).items():
            default = ""
            if parameter.default is parameter.empty:
                default = "  (required)"
            elif section[name] != parameter.default:
                default = f"  (default: {parameter.default!r})"
            yield f"{prefix}.{name} = {section[name]!r}{default}"
            yield textwrap.fill(said.get(name, ""), width, **indent)
        yield ""
