"""What a person sees: lines, and progress bars where there is a terminal."""

import time

import rich.console
import rich.progress

console = rich.console.Console()

_SECONDS_BETWEEN_LINES = 10


def say(text: str) -> None:
    """Prints a line to the person who watches, above the progress bar if there is one."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class Progress:
    """A bar that goes away when it is done; on a plain log, a line every ten seconds.

    Use as a context manager.

    Args:
      what: is done, such as "decoding".
      total: how many images there are to do.

    Attributes:
      done: how many are done.
    """

    def __init__(self, what: str, total: int):
        self._what, self._total, self.done = what, total, 0
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("images"),
            rich.progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
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
        if not console.is_terminal and due and self.done < self._total:
            self._last_line = now
            say(f"{self._what}: {self.done} of {self._total} images")
