"""Reads and writes `metrics.jsonl`: the metrics of a run, one JSON object a line."""

import io
import json
import os
import sys
from collections.abc import Sequence

from etils import epath

from slimconv_jax.console import say
from slimconv_jax.errors import InputError
from slimconv_jax.files import is_address, open_file, parse_json, read_bytes, replace_file
from slimconv_jax.storage.work_directory import METRICS

SPLITS = {"train": "training", "test": "test", "test_ema": "test, averaged weights"}
"""What a line may be about, and its label in pictures."""

_LONGEST_LINE = 2**16
"""The bytes of the longest line; ours have a few hundred."""

_KEYS = {"train": {"loss", "accuracy"}, "test": {"loss", "top1", "top5", "correct", "examples"}}
"""What a line of each split must have, besides its step and epoch."""


def read_metrics(workdir: epath.Path, damaged: set[int] | None = None) -> list[dict]:
    """Returns the lines of a run's `metrics.jsonl`; an empty list if there is no such file.

    Args:
      workdir: of the run.
      damaged: gets the numbers, from 1, of the lines that are left out because `MetricsFile` does
        not write such lines, except for a last line that was cut off when its run was killed.

    Raises:
      ValueError: if the file cannot be read.
    """
    path = workdir / METRICS
    metrics, damaged = [], set() if damaged is None else damaged
    try:
        with open_file(path) as file, io.BufferedReader(file) as stream:
            for number, text in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), b""), 1):
                if (line := _parse_line(text)) is not None:
                    metrics.append(line)
                elif text.endswith(b"\n") or len(text) == _LONGEST_LINE:
                    damaged.add(number)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    return metrics


def _parse_line(text: bytes) -> dict | None:
    """Parses a line of `metrics.jsonl`; returns None if it is damaged."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or line.get("split") not in tuple(SPLITS):
        return None
    numbers = {key: value for key, value in line.items() if key != "split"}
    needed = _KEYS["train" if line["split"] == "train" else "test"] | {"step", "epoch"}
    if not needed <= numbers.keys() or type(line["step"]) is not int:
        return None
    most = sys.float_info.max  # an integer may be larger
    is_finite = all(type(n) in (int, float) and abs(n) <= most for n in numbers.values())
    return line if is_finite else None


def rank_evaluations(lines: Sequence[dict]) -> list[dict]:
    """Returns the evaluations in `metrics.jsonl`, the best first, and of equals the earliest."""
    tests = [line for line in lines if line["split"] != "train"]
    return sorted(tests, key=lambda line: (-line["top1"], line["loss"]))


class MetricsFile:
    """A writer that keeps `metrics.jsonl`.

    Args:
      workdir: of the run.
      lines: those to begin with; others in the file are dropped.
      damaged: the numbers of damaged lines in the file; if there are some, a copy is kept.

    Raises:
      OSError: by all methods, if the file cannot be written.
    """

    def __init__(self, workdir: epath.Path, lines: Sequence[dict], damaged: set[int]):
        self._path = workdir / METRICS
        self._lines = list(lines)
        if damaged:
            self._keep(workdir, damaged)
        self._rewrite()

    def write(self, lines: Sequence[dict]) -> None:
        """Adds lines."""
        self._lines += lines
        if is_address(self._path):  # object stores cannot append
            self._rewrite()
        else:
            with open(os.fspath(self._path), "a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))

    def _rewrite(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        replace_file(self._path, text.encode())

    def _keep(self, workdir: epath.Path, numbers: set[int]) -> None:
        """Keeps a copy of the file before damaged lines are dropped."""
        names = (f"damaged-{METRICS}{suffix}" for suffix in ("", *map(".{}".format, range(1, 100))))
        aside = next(path for name in names if not (path := workdir / name).exists())
        aside.write_bytes(read_bytes(self._path))
        which = ", ".join(map(str, sorted(numbers)[:8])) + (" ..." if len(numbers) > 8 else "")
        which = f"lines {which} are" if len(numbers) > 1 else f"line {which} is"
        say(
            f"warning: {which} damaged in {self._path}; the run continues without, and the old "
            f"file is now {aside}"
        )
