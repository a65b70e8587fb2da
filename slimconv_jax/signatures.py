"""Reads options off functions: their names, defaults, types and meanings.

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
    """Returns the arguments of a function that are keys."""
    parameters = inspect.signature(function).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY or name == "name" or inspect.isclass(function)
    }


def select(options: Mapping[str, Any], function: Callable) -> dict[str, Any]:
    """Selects the options that are keys of a function."""
    return {name: options[name] for name in keys_of(function) if name in options}


def type_of(parameter: inspect.Parameter) -> type:
    """Returns the type of a value that is not None: bool, int, float, tuple, or str otherwise."""
    annotation = parameter.annotation
    choices = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ()
    known = [c for c in choices or (annotation,) if c in (bool, int, float, str)]
    if any(typing.get_origin(choice) is Sequence for choice in choices or (annotation,)):
        return tuple
    return known[0] if len(known) == 1 else str


def meanings(function: Callable) -> dict[str, str]:
    """Returns the description of each argument in the docstring of a function or class."""
    text = inspect.getdoc(function) or ""
    section = re.search(r"^(?:Args|Attributes):\n((?:  .*\n|\n)+)", text + "\n", re.MULTILINE)
    entries = re.findall(r"^  (\w+): ((?:.|\n(?!  [\w*]))*)", section[1] if section else "", re.M)
    return {name: " ".join(meaning.split()) for name, meaning in entries}
