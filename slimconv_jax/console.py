"""What a person sees: lines, and progress bars where there is a terminal."""

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
    """Lets a command print whatever names there are, warn in one line, and go on unread.

    A name that is not UTF-8, or that the terminal has no characters for, is printed with escapes.
    Where standard output or standard error is closed, or can take no more (a reader that has gone,
    a full disk), what is printed from then on is dropped, and the command goes on.

    Args:
      needs_stdout: whether the command is for what it prints, so that it ends when that cannot be
        printed: with a BrokenPipeError if the reader has gone, else with a ValueError.
    """
    for descriptor in range(3):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free
    for name, needed in (("stdout", needs_stdout), ("stderr", False)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w")))
        elif stream is getattr(sys, f"__{name}__") and _has_descriptor(stream):
            stream.flush()
            setattr(sys, name, _unbreakable(stream, needed=needed))
        elif hasattr(stream, "reconfigure"):  # those of tests have it not
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _format_warning
    sys.unraisablehook = _report_unraisable


def _report_unraisable(unraisable) -> None:
    """What Python does with an exception that nothing can catch, of a callback for one."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        # Ctrl-C came within a callback of the garbage collector, say, and would be lost: again.
        is_ctrl_c = type(unraisable.exc_value) is KeyboardInterrupt
        number = signal.SIGINT if is_ctrl_c else signal.SIGTERM
        main = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, [main, number]).start()
    # When a checkpoint cannot be written, which Orbax raises, what it has under way says this too.
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _has_descriptor(stream: io.TextIOWrapper) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError):
        return False
    return True


def _unbreakable(stream: io.TextIOWrapper, *, needed: bool) -> io.TextIOWrapper:
    """A standard stream that `_Output` writes, otherwise the same."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream.fileno(), needed=needed)),
        stream.encoding,
        "backslashreplace",
        # Without a buffer (python -u) line by line, which is soon enough.
        line_buffering=stream.line_buffering or stream.write_through,
    )


class _Output(io.FileIO):
    """A standard stream that is given up, for nowhere, when it can take no more.

    Args:
      descriptor: 1 or 2.
      needed: whether giving it up is an error, once.
    """

    def __init__(self, descriptor: int, *, needed: bool):
        super().__init__(descriptor, "wb", closefd=False)
        self._needed = needed

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
            if not self._needed:
                return len(data)
            if isinstance(error, BrokenPipeError):
                raise
            raise InputError(f"cannot write to standard output: {error.strerror}") from None


def exit_status(command: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Runs a command to its end, or to a sentence on standard error; returns its exit status.

    That is what the command returns, or 0; 1 after bad input, a lack of memory or when the reader
    of standard output has gone, as in `COMMAND | head`; 130 after Ctrl-C.

    Args:
      command: what to run.
      interrupted: the sentence about Ctrl-C.
    """
    try:
        try:
            status = command() or 0
        finally:
            sys.stdout.flush()
    except InputError as error:
        message, status = f"error: {error}", 1
    except (MemoryError, RecursionError, RuntimeError) as error:
        if (reason := exhausted(error)) is None:
            raise
        message, status = f"error: {reason}", 1
    except ModuleNotFoundError as error:  # of what only some commands need
        if (error.name or "").partition(".")[0] == "slimconv_jax":
            raise
        message = f"error: {missing(error.name or str(error), extra='train')}"
        status = 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        message, status = interrupted, 130
    else:
        return status
    print(message, file=sys.stderr)
    return status


@contextlib.contextmanager
def ctrl_c_held_back() -> Iterator[None]:
    """Lets Ctrl-C wait for the end of the block, where it would do harm within."""
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


def run_script(main: Callable[[], None]) -> None:
    """Runs a script that is for what it prints; see `exit_status`."""
    prepare_console(needs_stdout=True)
    if status := exit_status(main):
        sys.exit(status)


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

    @property
    def is_terminal(self) -> bool:
        """Whether the line can change."""
        return _stderr_console.is_terminal

    def __enter__(self) -> "Status":
        if self.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_) -> None:
        self._status.stop()

    def update(self, text: str) -> None:
        """Tells what is under way from now on."""
        if self.is_terminal:
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
        """Takes notice that more images are done."""
        self.done += images
        self._bar.advance(self._task, images)
        now = time.monotonic()
        due = now - self._last_line >= _SECONDS_BETWEEN_LINES
        if not self._console.is_terminal and due and self.done < self._total:
            self._last_line = now
            _print(self._console, f"{self._what}: {self.done} of {self._total} images")
