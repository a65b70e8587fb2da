"""What a config may hold, how it is read, and what the command line may change in it.

A section of a config is the keyword-only arguments of a function or two, and the keys outside the
sections are those of `Run`; so the functions themselves say which keys there are, with their
defaults and meanings. A config file sets those that differ.
"""

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

import ml_collections
from absl import flags
from ml_collections import config_dict, config_flags

import slimconv_jax
from slimconv_jax.data.datasets import load_source, load_splits
from slimconv_jax.data.loader import load_dataset
from slimconv_jax.data.preprocessing import normalize
from slimconv_jax.data.transforms import Transform
from slimconv_jax.errors import LIBRARY_ERRORS, InputError, require_integer, require_number
from slimconv_jax.models.zoo import create_model
from slimconv_jax.signatures import keys_of, meanings, type_of
from slimconv_jax.training.augment import augment
from slimconv_jax.training.loss import cross_entropy
from slimconv_jax.training.optimizer import create_optimizer, create_schedule
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
      checkpoint_every_steps: steps from one checkpoint to the next, beside those of the
        evaluations; 0 for no others.
      checkpoint_every_minutes: likewise in minutes, looked at every `log_every_steps`; 0 for no
        others.
      checkpoints_to_keep: how many of the newest checkpoints are kept, beside the best.
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
        minutes = self.checkpoint_every_minutes
        require_number("config.checkpoint_every_minutes", minutes, least=0)
        if not isinstance(self.init_from, str | None) or self.init_from == "":
            raise InputError(f"config.init_from={self.init_from!r} must be a path or None")


SECTIONS: dict[str, Sequence[Callable]] = {
    "model": (create_model,),
    "dataset": (load_source, load_splits),
    "transform": (Transform,),
    "loader": (load_dataset,),
    "normalize": (normalize,),
    "augment": (augment,),
    "optimizer": (create_schedule, create_optimizer),
    "step": (cross_entropy, make_train_step),
}
"""For each section, the functions whose keyword-only arguments are its keys."""


def keys(section: str) -> dict[str, inspect.Parameter]:
    """The keys that a section may have; "" is what is outside the sections."""
    functions = SECTIONS[section] if section else (Run,)
    return {name: p for function in functions for name, p in keys_of(function).items()}


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A config with all keys that there are; those that it lacks have their defaults.

    A key without a default is there too, as None.
    """
    config = ml_collections.ConfigDict(config)  # a copy, with its sections
    with config.unlocked():
        for where in ("", *SECTIONS):
            if where and where not in config:
                config[where] = ml_collections.ConfigDict()
            section = config[where] if where else config
            if not isinstance(section, ml_collections.ConfigDict):
                continue  # `check_config` says so
            for name, parameter in keys(where).items():
                if name not in section and parameter.default in (None, parameter.empty):
                    section[name] = config_dict.placeholder(type_of(parameter))
                elif name not in section:
                    section[name] = parameter.default
    return config


def default_values() -> dict:
    """The sections and keys of a config with their defaults, as JSON has them."""
    return json.loads(complete(ml_collections.ConfigDict()).to_json_best_effort())


def check_config(config: ml_collections.ConfigDict, num_devices: int) -> None:
    """Checks keys and numbers of a training config.

    Args:
      config: from `complete`.
      num_devices: over how many devices a batch is split.

    Raises:
      ValueError: if a key is unknown or missing, or a number is out of range.
    """
    for where in ("", *SECTIONS):
        section, name = (config[where], f"config.{where}") if where else (config, "config")
        if not isinstance(section, ml_collections.ConfigDict):
            raise InputError(f"{name} must be a section, that is a ConfigDict")
        allowed = keys(where)
        for key in section:
            if key not in allowed and (where or key not in SECTIONS):
                raise unknown_key(name, key, [*allowed, *([] if where else SECTIONS)])
        for key, parameter in allowed.items():
            if parameter.default is parameter.empty and section[key] is None:
                raise InputError(f"{name} lacks the key {key!r}")
    Run(**{key: config[key] for key in keys("")})
    parts = config.step.accumulation_steps
    require_integer("config.step.accumulation_steps", parts, 1)
    if config.batch_size % (num_devices * parts):
        each = f", each in {parts} parts" if parts > 1 else ""
        raise InputError(
            f"config.batch_size={config.batch_size} does not divide over {num_devices} "
            f"devices{each}; it must be a multiple of {num_devices * parts}"
        )


def unknown_key(where: str, key: str, allowed: Collection[str]) -> InputError:
    """The error about a key that a section of a config does not have."""
    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return InputError(f"{where} has no key {key!r}{hint}; its keys are: {', '.join(allowed)}")


def read_config(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The complete config of a file, changed as on the command line.

    Args:
      path: a config file, or the name of one that comes with this package, such as "digits"; with
        :ARGUMENT after it, what its get_config is called with.
      overrides: such as "--config.model.k=8/3"; "None" is None.

    Raises:
      ValueError: if there is no such config, it has no such key, or the key no such value.
    """
    config = complete(_load(path))
    values, nothing = _split_overrides(overrides)
    for key in (*values, *nothing):
        _find(config, key)
    arguments = ["", *itertools.chain(*values.values())]
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=parsed, sys_argv=arguments)
    try:
        rest = parsed(arguments)[1:]
    except (flags.Error, TypeError, ValueError, SyntaxError) as error:
        reason = "; ".join(str(error).splitlines())
        raise InputError(f"the config {path} cannot be changed so: {reason}") from None
    if rest:
        raise InputError(f"what is {rest[0]!r}? Options begin with --")
    config = parsed["config"].value
    config.update_from_flattened_dict(dict.fromkeys(nothing))
    return config


def _split_overrides(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The arguments of each key that gets a value, and the keys that get None.

    ml_collections would make a string or an error of None.
    """
    values, nothing = {}, {}
    arguments = iter(itertools.pairwise([*overrides, ""]))
    for argument, following in arguments:
        # --config.KEY=VALUE, --config.KEY VALUE, or of a boolean --config.KEY and --noconfig.KEY.
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(=.*)?", argument, re.DOTALL)
        if match is None:
            raise InputError(f"what is {argument!r}? A config is changed by --config.KEY=VALUE")
        key, value = match[2], match[3]
        taken = [argument]
        if value is None and following and not following.startswith("--"):
            value = f"={following}"
            taken.append(following)
            next(arguments)
        nothing.pop(key, None)
        if value not in ("=None", "=none"):
            values.setdefault(key, []).extend(taken)
        elif "[" in key:
            raise InputError(f"config.{key} cannot be None; the whole of it can be set in the file")
        else:
            values.pop(key, None)
            nothing[key] = None
    return values, list(nothing)


def _find(config: ml_collections.ConfigDict, key: str) -> None:
    """Makes sure that a config has a key, such as "model.k" or "milestones[0]"."""
    section, where = config, "config"
    for name in re.sub(r"\[.*?\]", "", key).split("."):
        if not isinstance(section, ml_collections.ConfigDict):
            raise InputError(f"{where} is a value, so there is no config.{key}")
        if name not in section:
            raise unknown_key(where, name, list(section))
        section, where = section[name], f"{where}.{name}"


def shipped_configs() -> dict[str, Path]:
    """The config files that come with this package, by name."""
    package = Path(slimconv_jax.__file__).parent
    # In a clone they lie beside the package.
    folders = (package / "configs", package.parent / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def _load(path: str) -> ml_collections.ConfigDict:
    """What the get_config of a config file returns; see `read_config`."""
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
    except (SyntaxError, InputError) as error:
        raise InputError(f"the config file {file} cannot be used: {error}") from None
    except LIBRARY_ERRORS as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        reason = f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        raise InputError(f"the config file {file} cannot be used: {reason}") from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"{file} is not a config file: its get_config must return a ConfigDict")
    return config


def describe_keys(config: ml_collections.ConfigDict, width: int) -> Iterator[str]:
    """The lines of `--help-config`: each key with its value, its default and its meaning.

    Args:
      config: from `read_config`.
      width: characters in a line.
    """
    for where in ("", *SECTIONS):
        said: Mapping[str, str] = {}
        for function in SECTIONS[where] if where else (Run,):
            said = meanings(function) | said
        section = config[where] if where else config
        for name, parameter in keys(where).items():
            key, default = f"config.{where}.{name}" if where else f"config.{name}", ""
            if parameter.default is parameter.empty:
                default = "  (required)"
            elif section[name] != parameter.default:
                default = f"  (default: {parameter.default!r})"
            yield f"{key} = {section[name]!r}{default}"
            yield textwrap.fill(
                said.get(name, ""), width, initial_indent="    ", subsequent_indent="    "
            )
        yield ""
