"""What is told of a run: a progress bar, or lines on a plain log, and files in its directory."""

import contextlib
import io
import itertools
import json
import math
import os
import queue
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import jax
import rich.progress
from etils import epath

from slimconv_jax.console import console, say
from slimconv_jax.errors import InputError
from slimconv_jax.files import open_file, parse_json, read_bytes, replace_file
from slimconv_jax.training.curves import CURVES, draw_curves
from slimconv_jax.training.tensorboard import EventWriter
from slimconv_jax.work_directory import METRICS, PICTURE, TENSORBOARD


def describe(result: dict) -> str:
    """An evaluation, as `summarize` gives it, in a few words."""
    words = "top-1 {top1:.2%} ({correct} of {examples} images), top-5 {top5:.2%}, loss {loss:.4f}"
    return words.format(**result)


def describe_skipped(skipped: Collection[str]) -> str:
    """Which images could not be decoded, at most ten by name."""
    some = sorted(skipped)[:10]
    more = f" and {len(skipped) - len(some)} more" if len(skipped) > len(some) else ""
    return f"left out, since they cannot be decoded: {', '.join(some)}{more}"


def read_metrics(workdir: epath.Path, damaged: set[int] | None = None) -> list[dict]:
    """The lines of a run's `metrics.jsonl`; none if there is no such file.

    Args:
      workdir: of the run.
      damaged: gets the numbers, from 1, of the lines that are left out since they are not as the
        `Reporter` writes them, but for a last one that was cut off when its run was killed.

    Raises:
      ValueError: if the file cannot be read.
    """
    path = workdir / METRICS
    metrics = []
    try:
        with open_file(path) as file, io.BufferedReader(file) as stream:
            for number in itertools.count(1):
                text = stream.readline(_LONGEST_LINE)
                if not text:
                    break
                if (line := _parse_line(text)) is not None:
                    metrics.append(line)
                elif text.endswith(b"\n") or len(text) == _LONGEST_LINE:
                    damaged = damaged if damaged is not None else set()
                    damaged.add(number)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    return metrics


_LONGEST_LINE = 2**16
"""The bytes of the longest line of `metrics.jsonl`; ours have some hundred."""

_KEYS = {"train": {"loss", "accuracy"}, "test": {"loss", "top1", "top5", "correct", "examples"}}
"""What a line of each split must have, beside its step and epoch."""


def _parse_line(text: bytes) -> dict | None:
    """A line of `metrics.jsonl`; None if it is damaged."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("split"), str):
        return None
    numbers = {key: value for key, value in line.items() if key != "split"}
    needed = _KEYS["train" if line["split"] == "train" else "test"] | {"step", "epoch"}
    if not needed <= numbers.keys() or line["split"] not in CURVES:
        return None
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers.values()):
        return None
    return line if type(line["step"]) is int else None


def rank_evaluations(lines: Sequence[dict]) -> list[dict]:
    """The evaluations in `metrics.jsonl`, the best first, and of equals the first."""
    tests = [line for line in lines if line["split"] != "train"]
    return sorted(tests, key=lambda line: (-line["top1"], line["loss"]))


class Reporter:
    """Shows and records metrics as they arrive from the devices.

    The loop hands over metrics that are not computed yet and goes on to the next step; a
    thread waits for them here. The loop waits too, but only for the step before, so that the
    devices always have work and a run can stop after the step it is in.

    Use as a context manager: the end of the block waits for what is outstanding. What goes
    wrong in the thread (a full disk, a loss that is not finite) is raised by the next call. Of
    several processes only the first one shows and records.

    Args:
      workdir: gets `metrics.jsonl`, `tensorboard/` and, at each evaluation, `curves.png`. Lines
        after `first_step`, left by a run that was interrupted after its last checkpoint, are
        dropped.
      title: of the picture.
      first_step: steps done before.
      total_steps: steps of the whole run.
      steps_per_epoch: steps in an epoch, not necessarily a whole number.
      batch_size: images in a step.
      log_every_steps: how many steps a line of training metrics averages over.
      eval_steps: where evaluations and checkpoints are, and lines of training metrics too, so
        that a run that continues there writes the same lines as an uninterrupted one.

    Attributes:
      lines: of `metrics.jsonl`.

    Raises:
      ValueError: by the methods, if the training diverged or a file cannot be written.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        title: str,
        first_step: int,
        total_steps: int,
        steps_per_epoch: float,
        batch_size: int,
        log_every_steps: int,
        eval_steps: Collection[int],
    ):
        self._workdir = workdir
        self._title = title
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._log_every_steps = log_every_steps
        self._eval_steps = eval_steps

        # A window is the steps since the last line of training metrics. Its seconds begin
        # with the first metrics that arrive, hence without compilation, and leave out
        # evaluations.
        self._begin_window()
        self._last_arrival = None

        damaged = set()
        lines = read_metrics(workdir, damaged)
        self.lines = [line for line in lines if line["step"] <= first_step]
        self._writer = None
        if jax.process_index() == 0:
            with _writing(workdir):
                if damaged:
                    self._keep_damaged(damaged)
                self._rewrite()
                self._writer = EventWriter(workdir / TENSORBOARD, first_step=first_step)

        self._bar = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[metrics]}"),
            rich.progress.TimeRemainingColumn(),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "compiling", completed=first_step, total=total_steps, metrics=""
        )
        self._pending = queue.Queue()
        self._may_go_on = threading.Semaphore(1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._report_pending, name="reporter", daemon=True)

    def __enter__(self) -> "Reporter":
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._error = self._error or error  # of what is pending nothing is written any more
            self._pending.put(None)
            self._bar.stop()
            if self._writer:
                with contextlib.suppress(OSError):
                    self._writer.close()
            return  # whoever says stop twice does not want to wait for the devices
        self._pending.put(None)
        self._thread.join()
        self._bar.stop()
        try:
            if self._writer:
                with _writing(self._workdir):
                    self._writer.close()
        except InputError:
            if kind is None and self._error is None:  # else there is a reason already
                raise
        if kind is None and self._error:
            raise self._error

    def train_step(self, step: int, metrics: dict[str, jax.Array], data_seconds: float) -> None:
        """Takes what is known of one training step.

        Args:
          step: its number, counted from 1.
          metrics: its metrics, perhaps not computed yet.
          data_seconds: how long the devices may have waited for its batch.
        """
        self._pending.put((self._report_train_step, step, metrics, data_seconds))
        self._may_go_on.acquire()
        self._raise()

    def wait(self) -> None:
        """Waits until everything is reported."""
        self._pending.join()
        self._raise()

    def test(self, step: int, results: Mapping[str, dict[str, float]]) -> None:
        """Takes evaluations after `step` steps, as `summarize` gives them, by name."""
        self.wait()
        for split, result in results.items():
            if not math.isfinite(result["loss"]):
                raise _diverged(f"{split} loss", result["loss"], step, self._workdir)
        lines = [{"step": step, "split": split, **result} for split, result in results.items()]
        self._append(*lines)
        for line in lines:
            split = line["split"]
            name = "test     " if split == "test" else "averaged "
            text = "loss {loss:.4f}  top-1 {top1:.2%}  top-5 {top5:.2%}".format(**line)
            self._print(step, name + text)
        self._pending.put((self._draw,))
        self._last_arrival = None

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _report_pending(self) -> None:
        for report, *arguments in iter(self._pending.get, None):
            try:
                if self._error is None:  # else only make room, so that nobody waits for ever
                    report(*arguments)
            except BaseException as error:  # whatever it is, `_raise` raises it in the loop
                self._error = error
            finally:
                if report == self._report_train_step:
                    self._may_go_on.release()
                self._pending.task_done()

    def _report_train_step(
        self, step: int, metrics: dict[str, jax.Array], data_seconds: float
    ) -> None:
        metrics = {key: value.item() for key, value in metrics.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise _diverged(name, metrics[name], step, self._workdir)
        now = time.perf_counter()
        if self._last_arrival is not None:
            self._window_steps_timed += 1
            self._window_seconds += now - self._last_arrival
            self._window_data_seconds += data_seconds
        self._last_arrival = now
        self._window.append(metrics)

        means = self._means()
        text = "loss {loss:.4f}  accuracy {accuracy:.1%}".format(**means)
        if "data_wait" in means:
            text += "  {images_per_second:,.0f} images/s".format(**means)
            if means["data_wait"] >= 0.01:
                text += "  {data_wait:.0%} waiting for data".format(**means)
        self._bar.update(self._task, description="training", completed=step, metrics=text)

        if step % self._log_every_steps == 0 or step in self._eval_steps:
            self._end_window(step, means)
            if not console.is_terminal:
                self._print(step, f"train    {text}")

    def flush(self, step: int) -> None:
        """Waits, and writes a line for the steps up to this one that have none yet."""
        self.wait()
        if self._window:
            self._end_window(step, self._means())

    def _means(self) -> dict[str, float]:
        """What is known of the steps since the last line."""
        means = {
            key: sum(metrics[key] for metrics in self._window) / len(self._window)
            for key in self._window[0]
        }
        if images := self._window_steps_timed * self._batch_size:
            means["images_per_second"] = images / self._window_seconds
            means["data_wait"] = self._window_data_seconds / self._window_seconds
        return means

    def _end_window(self, step: int, means: dict[str, float]) -> None:
        self._append({"step": step, "split": "train", **means})
        self._begin_window()

    def _begin_window(self) -> None:
        self._window = []
        self._window_steps_timed = 0
        self._window_seconds = self._window_data_seconds = 0.0

    def _append(self, *lines: dict) -> None:
        lines = [
            {"epoch": round(line["step"] / self._steps_per_epoch, 3), **line} for line in lines
        ]
        self.lines += lines
        if self._writer is None:
            return
        with _writing(self._workdir):
            if "://" in os.fspath(self._workdir):  # object stores cannot append
                self._rewrite()
            else:
                with (self._workdir / METRICS).open("a") as file:
                    file.write("".join(json.dumps(line) + "\n" for line in lines))
            for line in lines:
                scalars = {k: v for k, v in line.items() if k not in ("epoch", "step", "split")}
                self._writer.add_scalars(line["split"], scalars, line["step"])

    def _keep_damaged(self, numbers: set[int]) -> None:
        """Keeps a copy of `metrics.jsonl` before what is damaged in it is dropped."""
        names = (f"damaged-{METRICS}{suffix}" for suffix in ("", *map(".{}".format, range(1, 100))))
        aside = next(path for name in names if not (path := self._workdir / name).exists())
        aside.write_bytes(read_bytes(self._workdir / METRICS))
        which = ", ".join(map(str, sorted(numbers)[:8])) + (" ..." if len(numbers) > 8 else "")
        say(
            f"warning: {len(numbers)} of the lines of {self._workdir / METRICS} are damaged "
            f"({which}); as it was it is now {aside}, and the run continues without them"
        )

    def _rewrite(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        replace_file(self._workdir / METRICS, text.encode())

    def _draw(self) -> None:
        if self._writer:
            with _writing(self._workdir):
                replace_file(self._workdir / PICTURE, draw_curves(self.lines, self._title))

    def _print(self, step: int, text: str) -> None:
        epoch = step / self._steps_per_epoch
        width = len(str(self._total_steps))
        say(f"step {step:>{width}}/{self._total_steps}  epoch {epoch:.1f}  {text}")


@contextlib.contextmanager
def _writing(workdir: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {workdir}: {error}") from None


def _diverged(name: str, value: float, step: int, workdir: epath.Path) -> InputError:
    return InputError(
        f"the {name} is {value} at step {step}: the training diverged; the checkpoints before it "
        f"are kept in {workdir} (a lower optimizer.learning_rate, a longer warm-up or "
        "optimizer.clip_norm may help, with another --workdir)"
    )
