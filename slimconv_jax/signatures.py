"""Functions as the description of their options: names, defaults, types and meanings.

A keyword-only argument of a function is a key of a config, and so are an argument called `name`,
which chooses among several, and the fields of a class.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def keys_of(function: Callable) -> dict[str, inspect.Parameter]:
    """The arguments of a function that are keys."""
    parameters = inspect.signature(function).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY or name == "name" or inspect.isclass(function)
    }


def select(options: Mapping[str, Any], function: Callable) -> dict[str, Any]:
    """Those of some options that are arguments of a function."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


def type_of(parameter: inspect.Parameter) -> type:
    """What a value is, where it is not None: bool, int, float, tuple, or str for all else."""
    annotation = parameter.annotation
    choices = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ()
    known = [c for c in choices or (annotation,) if c in (bool, int, float, str)]
    if any(typing.get_origin(choice) is Sequence for choice in choices or (annotation,)):
        return tuple
    return known[0] if len(known) == 1 else str


def meanings(function: Callable) -> dict[str, str]:
    """What the docstring of a function or class says of each argument, each in one line."""
    text = inspect.getdoc(function) or ""
    section = re.search(r"^(?:Args|Attributes):\n((?:  .*\n|\n)+)", text + "\n", re.MULTILINE)
    entries = re.findall(r"^  (\w+): ((?:.|\n(?!  \w))*)", section[1] if section else "", re.M)
    return {name: " ".join(meaning.split()) for name, meaning in entries}
