"""What a person sees of a run: a progress bar, or lines on a plain log, and metrics.jsonl."""

import json
import queue
import threading
import time
from collections.abc import Collection

import jax
import rich.progress
from etils import epath

from slimconv_jax.console import console, say
from slimconv_jax.training.evaluate import summarize

MAX_PENDING = 8


def describe(result: dict) -> str:
    """An evaluation, as `summarize` gives it, in a few words."""
    words = "top-1 {top1:.2%} ({correct} of {examples} images), top-5 {top5:.2%}, loss {loss:.4f}"
    return words.format(**result)


def describe_skipped(skipped: Collection[str]) -> str:
    """Which images could not be decoded, at most ten by name."""
    some = sorted(skipped)[:10]
    more = f" and {len(skipped) - len(some)} more" if len(skipped) > len(some) else ""
    return f"left out, since they cannot be decoded: {', '.join(some)}{more}"


def read_metrics(workdir: epath.Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`; none if there is no such file.

    They end before a line that is no JSON: one that was cut off when its run was killed.
    """
    path = workdir / "metrics.jsonl"
    metrics = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics


class Reporter:
    """Shows and records metrics as they arrive from the devices.

    The loop hands over metrics that are not computed yet and goes on to the next step; a
    thread waits for them here. Only when `MAX_PENDING` results are outstanding does the loop
    wait too, so that batches do not pile up in the devices' memory.

    Use as a context manager: the end of the block waits for what is outstanding. What goes
    wrong in the thread (a full disk, say) is raised by the next call.

    Args:
      workdir: where `metrics.jsonl` goes. Its lines after `first_step`, left by a run that
        was interrupted after its last checkpoint, are dropped.
      first_step: steps done before.
      total_steps: steps of the whole run.
      steps_per_epoch: steps in an epoch, not necessarily a whole number.
      batch_size: images in a step.
      log_every_steps: how many steps a line of training metrics averages over.
      eval_steps: where evaluations and checkpoints are, and lines of training metrics too, so
        that a run that continues there writes the same lines as an uninterrupted one.

    Attributes:
      evaluation: what was last written to `metrics.jsonl` about the test images.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        first_step: int,
        total_steps: int,
        steps_per_epoch: float,
        batch_size: int,
        log_every_steps: int,
        eval_steps: Collection[int],
    ):
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._log_every_steps = log_every_steps
        self._eval_steps = eval_steps
        self.evaluation: dict | None = None

        # A window is the steps since the last line of training metrics. Its seconds begin
        # with the first metrics that arrive, hence without compilation, and leave out
        # evaluations.
        self._begin_window()
        self._last_arrival = None

        kept = [line for line in read_metrics(workdir) if line["step"] <= first_step]
        part = workdir / "metrics.jsonl.part"
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = part.replace(workdir / "metrics.jsonl").open("a")

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
        self._pending = queue.Queue(maxsize=MAX_PENDING)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._report_pending, name="reporter")

    def __enter__(self) -> "Reporter":
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._pending.put(None)
        self._thread.join()
        self._bar.stop()
        self._file.close()
        if kind is None and self._error:
            raise self._error

    def train_step(self, step: int, metrics: dict[str, jax.Array], data_seconds: float) -> None:
        """Takes what is known of one training step.

        Args:
          step: its number, counted from 1.
          metrics: its metrics, perhaps not computed yet.
          data_seconds: how long the devices may have waited for its batch.
        """
        self._put(self._report_train_step, step, metrics, data_seconds)

    def test(self, step: int, totals: dict[str, jax.Array]) -> None:
        """Takes the totals of an evaluation after `step` steps; see `make_evaluate`."""
        self._put(self._report_test, step, totals)

    def _put(self, *item) -> None:
        if self._error:
            raise self._error
        self._pending.put(item)

    def _report_pending(self) -> None:
        for report, step, metrics, *more in iter(self._pending.get, None):
            if self._error is None:  # else only make room, so that nobody waits for ever
                try:
                    report(step, {key: value.item() for key, value in metrics.items()}, *more)
                except Exception as error:
                    self._error = error

    def _report_train_step(self, step: int, metrics: dict[str, float], data_seconds: float) -> None:
        now = time.perf_counter()
        if self._last_arrival is not None:
            self._window_steps_timed += 1
            self._window_seconds += now - self._last_arrival
            self._window_data_seconds += data_seconds
        self._last_arrival = now
        self._window.append(metrics)

        means = {
            key: sum(metrics[key] for metrics in self._window) / len(self._window)
            for key in metrics
        }
        images = self._window_steps_timed * self._batch_size
        if images:
            means["images_per_second"] = images / self._window_seconds
            means["data_wait"] = self._window_data_seconds / self._window_seconds
        text = "loss {loss:.4f}  accuracy {accuracy:.1%}".format(**means)
        if images:
            text += "  {images_per_second:,.0f} images/s".format(**means)
            if means["data_wait"] >= 0.01:
                text += "  {data_wait:.0%} waiting for data".format(**means)
        self._bar.update(self._task, description="training", completed=step, metrics=text)

        if step % self._log_every_steps == 0 or step in self._eval_steps:
            self._write({"step": step, "split": "train", **means})
            if not console.is_terminal:
                self._print(step, f"train {text}")
            self._begin_window()

    def _begin_window(self) -> None:
        self._window = []
        self._window_steps_timed = 0
        self._window_seconds = self._window_data_seconds = 0.0

    def _report_test(self, step: int, totals: dict[str, float]) -> None:
        self._last_arrival = time.perf_counter()
        self.evaluation = {"step": step, "split": "test", **summarize(totals)}
        self._write(self.evaluation)
        text = "test  loss {loss:.4f}  top-1 {top1:.2%}  top-5 {top5:.2%}"
        self._print(step, text.format(**self.evaluation))

    def _write(self, line: dict) -> None:
        line = {"epoch": round(line["step"] / self._steps_per_epoch, 3), **line}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _print(self, step: int, text: str) -> None:
        epoch = step / self._steps_per_epoch
        width = len(str(self._total_steps))
        say(f"step {step:>{width}}/{self._total_steps}  epoch {epoch:.1f}  {text}")
