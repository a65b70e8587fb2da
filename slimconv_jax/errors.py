"""The one exception that means "the input is wrong, not the program"."""

from numbers import Integral


class InputError(ValueError):
    """Input that cannot be used; the message is one sentence for the user.

    It says what is wrong, where, and what is allowed. The command lines print it
    without a traceback and exit with status 1; in library code it is an ordinary
    `ValueError`.
    """


def require_integer(name: str, value: object, least: int) -> None:
    """Raises an InputError unless `value` is an integer, of Python or NumPy, >= `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={value!r} must be an integer >= {least}")
