"""Prints what a user sees: lines, and progress bars on a terminal."""

import contextlib
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

from slimconv_jax.errors import InputError, InputWarning, exhausted, missing, printable

console = rich.console.Console()
_stderr_console = rich.console.Console(stderr=True)

_SECONDS_BETWEEN_LINES = 10


def prepare_console(*, needs_stdout: bool = False) -> None:
    """Lets a command print any name, warn in one line, and go on if nobody reads its output.

    A name that is not UTF-8, or that the terminal has no characters for, is printed with escapes.
    If standard output or standard error is closed, or cannot be written (the reader is gone, the
    disk is full), further output is dropped, and the command goes on.

    Args:
      needs_stdout: whether the output is the purpose of the command, so that it ends when that
        cannot be written: with a BrokenPipeError if the reader is gone, else with a ValueError.
    """
    # Opens those of 0, 1 and 2 that are closed, which the next files would get otherwise.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    for name, needed in (("stdout", needs_stdout), ("stderr", False)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w")))
        elif stream is getattr(sys, f"__{name}__") and _has_descriptor(stream):
            stream.flush()
            output = io.BufferedWriter(_Output(stream.fileno(), needed=needed))
            # An unbuffered stream (python -u) becomes line-buffered, which is soon enough.
            options = {"line_buffering": stream.line_buffering or stream.write_through}
            output = io.TextIOWrapper(output, stream.encoding, "backslashreplace", **options)
            setattr(sys, name, output)
        elif hasattr(stream, "reconfigure"):  # the streams of tests do not have it
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _format_warning
    sys.unraisablehook = _report_unraisable


def _report_unraisable(unraisable) -> None:
    """Handles an exception that nothing can catch, such as one in a callback."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        # Ctrl-C in a callback, say of the garbage collector, would be lost: sends it again.
        is_ctrl_c = type(unraisable.exc_value) is KeyboardInterrupt
        number = signal.SIGINT if is_ctrl_c else signal.SIGTERM
        arguments = [threading.main_thread().ident, number]
        threading.Timer(0.05, signal.pthread_kill, arguments).start()
    # When Orbax cannot write a checkpoint, it raises that error, and its event loops add this one.
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _has_descriptor(stream: io.TextIOWrapper) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError):
        return False
    return True


class _Output(io.FileIO):
    """A standard stream that is redirected to os.devnull when it cannot be written.

    Args:
      descriptor: 1 or 2.
      needed: whether the write that fails is an error.
    """

    def __init__(self, descriptor: int, *, needed: bool):
        super().__init__(descriptor, "wb", closefd=False)
        self._needed = needed

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            if not self._needed:
                return len(data)
            if isinstance(error, BrokenPipeError):
                raise
            raise InputError(f"cannot write to standard output: {error.strerror}") from None


def exit_status(
    command: Callable[[], int | None], *, interrupted: str = "interrupted", extra: str = "train"
) -> int:
    """Runs a command, prints an error as one sentence on standard error; returns the exit status.

    The status is that of the command, or 0; 1 after bad input, a lack of memory, or if the reader
    of standard output is gone, as in `COMMAND | head`; 130 after Ctrl-C.

    Args:
      command: the function to run.
      interrupted: the sentence after Ctrl-C.
      extra: the extra of this package that the command needs.
    """
    try:
        try:
            return command() or 0
        finally:
            sys.stdout.flush()
    except InputError as error:
        message = str(error)
    except (MemoryError, RecursionError, RuntimeError) as error:
        if (message := exhausted(error)) is None:
            raise
    except ModuleNotFoundError as error:  # a package that only some commands need
        if (error.name or "").partition(".")[0] == "slimconv_jax":
            raise
        message = missing(error.name or str(error), extra=extra)
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def ctrl_c_held_back() -> Iterator[None]:
    """Delays Ctrl-C until the end of a block in which it would do harm."""
    received = []
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: received.append(True)) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt


_format_warning_of_python = warnings.formatwarning


def _format_warning(message: Warning | str, category: type[Warning], *where) -> str:
    if issubclass(category, InputWarning):
        return f"warning: {printable(str(message))}\n"
    return _format_warning_of_python(message, category, *where)


def say(text: str) -> None:
    """Prints a line on standard output, above the progress bar if there is one."""
    _print(console, text)


def _print(to: rich.console.Console, text: str) -> None:
    to.print(printable(text), highlight=False, markup=False, soft_wrap=True)


class Status:
    """Shows the current activity on standard error: one changing line, or lines on a plain log.

    Use as a context manager.

    Attributes:
      is_terminal: whether the line can change.
    """

    def __init__(self):
        self._status = _stderr_console.status("")
        self.is_terminal = _stderr_console.is_terminal

    def __enter__(self) -> "Status":
        if self.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_) -> None:
        self._status.stop()

    def update(self, text: str) -> None:
        """Shows a new activity."""
        if self.is_terminal:
            self._status.update(text)
        else:
            _print(_stderr_console, text)


class Progress:
    """A progress bar that disappears at the end; on a plain log, a line every ten seconds.

    Use as a context manager.

    Args:
      what: the activity, such as "decoding".
      total: the number of images.
      stderr: whether to use standard error, because the command prints results meanwhile.

    Attributes:
      done: the number of images that are done.
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
        self._next_line = time.monotonic() + 2

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        """Counts more images as done."""
        self.done += images
        self._bar.advance(self._task, images)
        is_due = not self._console.is_terminal and time.monotonic() >= self._next_line
        if is_due and self.done < self._total:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            _print(self._console, f"{self._what}: {self.done} of {self._total} images")
