"""What a person sees: lines, and progress bars where there is a terminal."""

import sys
import time
import warnings

import rich.console
import rich.progress

from slimconv_jax.errors import InputWarning, printable

console = rich.console.Console()
_stderr_console = rich.console.Console(stderr=True)

_SECONDS_BETWEEN_LINES = 10


def prepare_console() -> None:
    """Lets the commands print whatever files and classes are named, and warn in one line.

    A name that is no UTF-8, or that the terminal has no characters for, is printed with escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # those of tests have it not
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _format_warning


_format_warning_of_python = warnings.formatwarning


def _format_warning(message: Warning | str, category: type[Warning], *where) -> str:
    if issubclass(category, InputWarning):
        return f"warning: {printable(str(message))}\n"
    return _format_warning_of_python(message, category, *where)


def say(text: str) -> None:
    """Prints a line to the person who watches, above the progress bar if there is one."""
    _print(console, text)


def _print(to: rich.console.Console, text: str) -> None:
    to.print(printable(text), highlight=False, markup=False, soft_wrap=True)


class Status:
    """What is under way, on standard error: a line that changes, on a plain log several lines.

    Use as a context manager.
    """

    def __init__(self):
        self._status = _stderr_console.status("")

    def __enter__(self) -> "Status":
        if _stderr_console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_) -> None:
        self._status.stop()

    def update(self, text: str) -> None:
        """Tells what is under way from now on."""
        if _stderr_console.is_terminal:
            self._status.update(text)
        else:
            _print(_stderr_console, text)


class Progress:
    """A bar that goes away when it is done; on a plain log, a line every ten seconds.

    Use as a context manager.

    Args:
      what: is done, such as "decoding".
      total: how many images there are to do.
      stderr: whether to show it on standard error, for the sake of what is printed meanwhile.

    Attributes:
      done: how many are done.
    """

    def __init__(self, what: str, total: int, *, stderr: bool = False):
        self._what, self._total, self.done = what, total, 0
        self._console = _stderr_console if stderr else console
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("images"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total)
        self._last_line = time.monotonic() - _SECONDS_BETWEEN_LINES + 2  # first after 2 s

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        """Tells that so many more images are done."""
        self.done += images
        self._bar.advance(self._task, images)
        now = time.monotonic()
        due = now - self._last_line >= _SECONDS_BETWEEN_LINES
        if not self._console.is_terminal and due and self.done < self._total:
            self._last_line = now
            _print(self._console, f"{self._what}: {self.done} of {self._total} images")
