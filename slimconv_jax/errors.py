"""Defines the exception for wrong input, and the checks that raise it.

`InputError` means that the input is wrong, not the program; `InputWarning`, that part of the input
was not used.
"""

import importlib
import pickle
import re
import struct
import types
import zipfile
import zlib
from collections.abc import Collection
from numbers import Integral, Real

LIBRARY_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError),
    *(MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
    *(pickle.PickleError, struct.error, zipfile.BadZipFile, zlib.error),
)
"""What libraries raise for input that they trust but should not, such as damaged files."""


class InputError(ValueError):
    """Input cannot be used; the message is one sentence for the user.

    It says what is wrong, where, and what is allowed. The commands print it without a traceback
    and exit with status 1; in library code it is an ordinary `ValueError`.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class InputWarning(UserWarning):
    """Part of the input is not used, or it may not be what the user meant."""


def printable(text: str) -> str:
    """Escapes the characters of a text that would move the cursor of a terminal or colour it.

    The names of files and classes may hold such characters. Newlines and tabs stay.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def require_integer(name: str, value: object, least: int, most: int = 2**20) -> None:
    """Raises an InputError unless `value` is an integer, of Python or NumPy, in a range.

    The default of `most` is beyond any sensible size, so that a value that would hang or fill the
    memory is refused at once.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={value!r} must be an integer >= {least}")
    if value > most:
        raise InputError(f"{name}={value!r} must be an integer from {least} to {most}")


def require_number(
    name: str, value: object, *, least: float, below: float = 1e6, most: float | None = None
) -> None:
    """Raises an InputError unless `value` is a number >= `least` and < `below`, or <= `most`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if most is not None:
        if not is_number or not least <= value <= most:
            raise InputError(f"{name}={value!r} must be a number from {least:g} to {most:g}")
    elif not is_number or not least <= value < below:  # also refuses NaN
        limit = "" if below == 1e6 and is_number and not value >= below else f" and < {below:g}"
        raise InputError(f"{name}={value!r} must be a number >= {least}{limit}")


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises an InputError unless `value` is one of some strings."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def import_extra(module: str, *, extra: str, package: str | None = None) -> types.ModuleType:
    """Imports a module of an optional dependency.

    Args:
      module: its name.
      extra: the extra of this package that installs it.
      package: its name in messages, if that is not the name of the module.

    Raises:
      ValueError: if it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError):
        raise InputError(missing(package or module, extra=extra)) from None


def missing(package: str, *, extra: str) -> str:
    """Returns the sentence about a missing package, with the command that installs it."""
    return (
        f"this needs {package}, which is not installed: pip install 'slimconv_jax[{extra}]', or, "
        f"in a clone, pip install -e '.[{extra}]'"
    )


def exhausted(error: Exception) -> str | None:
    """Returns the sentence about an error if memory or the stack ran out, else None."""
    if isinstance(error, RecursionError):
        return f"the input is nested too deeply: {error}"
    reason = str(error).strip().partition("\n")[0]
    signs = ("RESOURCE_EXHAUSTED", "out of memory", "allocate")  # of XLA, CUDA and PyTorch
    if not isinstance(error, MemoryError) and not any(sign in reason for sign in signs):
        return None
    return (
        f"there is not enough memory ({reason or 'of this machine'}); smaller batches, smaller "
        "images or a narrower model need less"
    )
