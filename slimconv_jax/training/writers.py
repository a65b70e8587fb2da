"""Creates the writers of a run's metrics, each of which takes lines as in `metrics.jsonl`.

A writer has `write(lines)`, which raises an OSError if it fails. To add one, write its class and
add a line to `create_writers`; what may fail without ending the run is a logger.
"""

from collections.abc import Sequence
from typing import Protocol

from etils import epath

from slimconv_jax.files import replace_file
from slimconv_jax.storage.work_directory import PICTURE
from slimconv_jax.training.curves import draw_curves
from slimconv_jax.training.loggers import RunInfo
from slimconv_jax.training.metrics import MetricsFile


class Writer(Protocol):
    """The interface of every writer; see the module's docstring."""

    def write(self, lines: Sequence[dict]) -> None: ...


def create_writers(run: RunInfo, lines: Sequence[dict], *, damaged: set[int]) -> list[Writer]:
    """Creates the writers of a run.

    Args:
      run: its work directory gets `metrics.jsonl` and, at each evaluation, `curves.png`.
      lines: the existing ones, up to the first step.
      damaged: see `MetricsFile`.

    Raises:
      OSError: if a file cannot be written.
    """
    return [
        MetricsFile(run.workdir, lines, damaged),
        Picture(run.workdir, lines, run.title),
    ]


class Picture:
    """A writer that draws `curves.png` at each evaluation.

    Args:
      workdir: of the run.
      lines: the existing ones.
      title: of the picture.
    """

    def __init__(self, workdir: epath.Path, lines: Sequence[dict], title: str):
        self._path, self._lines, self._title = workdir / PICTURE, list(lines), title

    def write(self, lines: Sequence[dict]) -> None:
        """Takes lines, and draws all of them if there is a new evaluation."""
        self._lines += lines
        if any(line["split"] != "train" for line in lines):
            replace_file(self._path, draw_curves(self._lines, self._title))
