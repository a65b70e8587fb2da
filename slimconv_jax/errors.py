"""The one exception that means "the input is wrong, not the program"."""


class InputError(ValueError):
    """Input that cannot be used; the message is one sentence for the user.

    It says what is wrong, where, and what is allowed. The command lines print it
    without a traceback and exit with status 1; in library code it is an ordinary
    `ValueError`.
    """
