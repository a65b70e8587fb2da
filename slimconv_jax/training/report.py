"""Reports a run while it goes on: a progress bar, or lines on a plain log, and files."""

import contextlib
import dataclasses
import json
import math
import queue
import threading
from collections.abc import Iterator, Mapping

import jax
import ml_collections
import rich.progress
from etils import epath

from slimconv_jax.console import console, say
from slimconv_jax.errors import InputError
from slimconv_jax.storage.checkpoints import list_checkpoints
from slimconv_jax.storage.work_directory import flatten
from slimconv_jax.training.loggers import Loggers, RunInfo, identify
from slimconv_jax.training.metrics import read_metrics
from slimconv_jax.training.timetable import Timetable
from slimconv_jax.training.window import Window
from slimconv_jax.training.writers import create_writers


@dataclasses.dataclass(eq=False)
class Reporter:
    """Shows and records metrics as they arrive from the devices.

    The loop hands over metrics that are not computed yet and goes on to the next step; a
    thread waits for them here. The loop waits too, but only for the step before. So the devices
    always have work, and a run can stop after its current step.

    Use as a context manager: the end of the block waits until everything is reported. Errors in
    the thread (a full disk, a loss that is not finite) are raised by the next call. Of several
    processes, only the first one shows and records.

    Attributes:
      workdir: gets the files of `create_writers`. Lines after `first_step`, left by a run that was
        interrupted after its last checkpoint, are dropped.
      timetable: of the run. Each of its `checkpoint_steps` gets a line of training metrics, so that
        a run that continues there writes the same lines as an uninterrupted one.
      config: of the run.
      title: of the picture.
      first_step: steps done before.
      lines: of `metrics.jsonl`.

    Raises:
      ValueError: by the methods, if the training diverged or a file cannot be written.
    """

    workdir: epath.Path
    timetable: Timetable
    config: ml_collections.ConfigDict
    _: dataclasses.KW_ONLY
    title: str
    first_step: int

    def __post_init__(self):
        self._window = Window()
        damaged: set[int] = set()
        lines = read_metrics(self.workdir, damaged)
        self.lines = [line for line in lines if line["step"] <= self.first_step]
        self._writers, self._loggers = [], None
        if jax.process_index() == 0:
            with _writing(self.workdir):
                config = flatten(json.loads(self.config.to_json_best_effort()))
                needs_identity = set(self.config.loggers) - {"tensorboard"}
                identity = identify(self.workdir, self.first_step) if needs_identity else ""
                run = RunInfo(self.workdir, config, self.title, self.first_step, identity)
                files = create_writers(run, self.lines, damaged=damaged)
                self._loggers = Loggers(self.config.loggers, run)
                self._writers = [*files, self._loggers]
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
        total = self.timetable.total_steps
        self._task = self._bar.add_task(
            "compiling", completed=self.first_step, total=total, metrics=""
        )
        self._pending = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._report_pending, name="reporter", daemon=True)

    def __enter__(self) -> "Reporter":
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, KeyboardInterrupt):
            # After a second Ctrl-C nobody wants to wait for the devices: drops what is pending.
            self._error = self._error or error
            self._pending.put(None)
            self._loggers = None
        else:
            self._pending.put(None)
            self._thread.join()
        self._bar.stop()
        if self._loggers:
            failure = error or self._error
            self._loggers.close(getattr(failure, "status", 1) if failure else 0)
        if error is None and self._error:
            raise self._error

    def train_step(self, step: int, metrics: dict[str, jax.Array], data_seconds: float) -> None:
        """Takes the metrics of one training step.

        Args:
          step: its number, counted from 1.
          metrics: its metrics, perhaps not computed yet.
          data_seconds: how long the devices may have waited for its batch.
        """
        self.wait()  # for the step before
        self._pending.put((self._report_train_step, step, metrics, data_seconds))

    def wait(self) -> None:
        """Waits until everything is reported."""
        self._pending.join()
        if self._error:
            raise self._error

    def test(self, step: int, results: Mapping[str, dict[str, float]]) -> None:
        """Takes the evaluations after `step` steps, by name, each a result of `summarize`."""
        self.wait()
        for split, result in results.items():
            self._require_finite(f"{split} loss", result["loss"], step)
        for split, result in results.items():
            name = "test    " if split == "test" else "averaged"
            text = "loss {loss:.4f}  top-1 {top1:.2%}  top-5 {top5:.2%}".format(**result)
            self._print(step, f"{name} {text}")
        lines = [{"step": step, "split": split, **result} for split, result in results.items()]
        self._pending.put((self._append, *lines))
        self._window.pause()

    def _report_pending(self) -> None:
        for report, *arguments in iter(self._pending.get, None):
            try:
                if self._error is None:  # else only empties the queue, so that nobody hangs
                    report(*arguments)
            except BaseException as error:  # of any kind; `wait` raises it in the loop
                self._error = error
            finally:
                self._pending.task_done()

    def _report_train_step(
        self, step: int, metrics: dict[str, jax.Array], data_seconds: float
    ) -> None:
        metrics = {key: value.item() for key, value in metrics.items()}
        for name in ("loss", "grad_norm"):
            self._require_finite(name, metrics[name], step)
        phase = self.timetable.phase_of(step)
        if step == phase.first_step + 1:
            self._window.pause()  # the step was compiled for images of another size
        self._window.add(metrics, data_seconds, phase.batch_size)
        text = _describe_training(self._window.means())
        self._bar.update(self._task, description="training", completed=step, metrics=text)

        if step % self.config.log_every_steps == 0 or step in self.timetable.checkpoint_steps:
            self._end_window(step)

    def flush(self, step: int) -> None:
        """Waits, and writes a line for the steps up to this one that are in none yet."""
        self.wait()
        if self._window:
            self._end_window(step)

    def _end_window(self, step: int) -> None:
        means = self._window.end()
        self._append({"step": step, "split": "train", **means})
        if not console.is_terminal:
            self._print(step, f"train    {_describe_training(means)}")

    def _append(self, *lines: dict) -> None:
        lines = [
            {"epoch": round(self.timetable.epoch_of(line["step"]), 3), **line} for line in lines
        ]
        self.lines += lines
        with _writing(self.workdir):
            for writer in self._writers:
                writer.write(lines)

    def _print(self, step: int, text: str) -> None:
        total, epoch_of = self.timetable.total_steps, self.timetable.epoch_of
        width, epochs = len(str(total)), len(f"{epoch_of(total):.1f}")
        say(f"step {step:>{width}}/{total}  epoch {epoch_of(step):{epochs}.1f}  {text}")

    def _require_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            saved = list_checkpoints(self.workdir)
            kept = "the checkpoints before it are kept" if saved else "no checkpoint was saved"
            raise InputError(
                f"the {name} is {value} at step {step}: the training diverged; {kept} in "
                f"{self.workdir} (a lower optimizer.learning_rate, a longer warm-up "
                "or optimizer.clip_norm may help, with another --workdir)"
            )


def _describe_training(means: Mapping[str, float]) -> str:
    """Formats the means of a `Window`."""
    text = "loss {loss:.4f}  accuracy {accuracy:.1%}".format(**means)
    if "data_wait" in means:
        text += "  {images_per_second:,.0f} images/s".format(**means)
        if means["data_wait"] >= 0.01:
            text += "  {data_wait:.0%} waiting for data".format(**means)
    return text


@contextlib.contextmanager
def _writing(workdir: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {workdir}: {error}") from None
