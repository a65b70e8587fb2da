"""The one exception that means "the input is wrong, not the program", and checks that raise it.

And the one warning that means "part of the input was not used".
"""

import importlib
import pickle
import re
import struct
import types
import zipfile
import zlib
from numbers import Integral, Real

LIBRARY_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError),
    *(MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
    *(pickle.PickleError, struct.error, zipfile.BadZipFile, zlib.error),
)
"""What libraries raise for input that they trust and should not: damaged files, say."""


class InputError(ValueError):
    """Input that cannot be used; the message is one sentence for the user.

    It says what is wrong, where, and what is allowed. The command lines print it
    without a traceback and exit with status 1; in library code it is an ordinary
    `ValueError`.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class InputWarning(UserWarning):
    """Input that is used in part, or may not be what is meant; the message is for the user."""


def printable(text: str) -> str:
    """A text with escapes for what would move the cursor of a terminal or colour it.

    The names of files and classes may hold such characters. Line ends and tabs stay.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def require_integer(name: str, value: object, least: int, most: int = 2**20) -> None:
    """Raises an InputError unless `value` is an integer, of Python or NumPy, in a range.

    The default of `most` is beyond all sense for sizes, so that what would hang or fill the memory
    is told at once.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={value!r} must be an integer >= {least}")
    if value > most:
        raise InputError(f"{name}={value!r} must be an integer from {least} to {most}")


def require_number(name: str, value: object, *, least: float, below: float = 1e6) -> None:
    """Raises an InputError unless `value` is a number >= `least` and < `below`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not least <= value < below:  # which NaN is not either
        limit = "" if below == 1e6 and is_number and not value >= below else f" and < {below:g}"
        raise InputError(f"{name}={value!r} must be a number >= {least}{limit}")


def import_extra(module: str, *, extra: str, package: str | None = None) -> types.ModuleType:
    """A module of an optional dependency.

    Args:
      module: what is imported.
      extra: which of this package's extras has it.
      package: what people call it, if not by the name of the module.

    Raises:
      ValueError: if it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError):
        raise InputError(missing(package or module, extra=extra)) from None


def missing(package: str, *, extra: str) -> str:
    """The sentence about a package that is not installed, with the command that installs it."""
    return (
        f"this needs {package}, which is not installed: pip install 'slimconv_jax[{extra}]', or, "
        f"in a clone, pip install -e '.[{extra}]'"
    )


def exhausted(error: Exception) -> str | None:
    """What to tell of an error that means that memory or the stack ran out; None of others."""
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
