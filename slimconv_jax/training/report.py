"""What is told of a run while it goes on: a progress bar, or lines on a plain log, and files."""

import contextlib
import math
import queue
import threading
from collections.abc import Collection, Iterator, Mapping

import jax
import rich.progress
from etils import epath

from slimconv_jax.console import console, say
from slimconv_jax.errors import InputError
from slimconv_jax.training.metrics import read_metrics
from slimconv_jax.training.window import Window
from slimconv_jax.training.writers import create_writers


class Reporter:
    """Shows and records metrics as they arrive from the devices.

    The loop hands over metrics that are not computed yet and goes on to the next step; a
    thread waits for them here. The loop waits too, but only for the step before, so that the
    devices always have work and a run can stop after the step it is in.

    Use as a context manager: the end of the block waits for what is outstanding. What goes
    wrong in the thread (a full disk, a loss that is not finite) is raised by the next call. Of
    several processes only the first one shows and records.

    Args:
      workdir: gets what the writers write; see `create_writers`. Lines after `first_step`, left by
        a run that was interrupted after its last checkpoint, are dropped.
      title: of the picture.
      first_step: steps done before.
      total_steps: steps of the whole run.
      steps_per_epoch: steps in an epoch, not necessarily a whole number.
      batch_size: images in a step.
      log_every_steps: how many steps a line of training metrics averages over.
      line_steps: where evaluations and checkpoints are, and lines of training metrics too, so
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
        line_steps: Collection[int],
    ):
        self._workdir = workdir
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._log_every_steps = log_every_steps
        self._line_steps = line_steps
        self._window = Window(batch_size)

        damaged: set[int] = set()
        lines = read_metrics(workdir, damaged)
        self.lines = [line for line in lines if line["step"] <= first_step]
        self._writers = []
        if jax.process_index() == 0:
            with _writing(workdir):
                self._writers = create_writers(
                    workdir, self.lines, title=title, first_step=first_step, damaged=damaged
                )

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
            for writer in self._writers:
                with contextlib.suppress(OSError):
                    writer.close()
            return  # whoever says stop twice does not want to wait for the devices
        self._pending.put(None)
        self._thread.join()
        self._bar.stop()
        try:
            with _writing(self._workdir):
                for writer in self._writers:
                    writer.close()
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
        for line in lines:
            split = line["split"]
            name = "test     " if split == "test" else "averaged "
            text = "loss {loss:.4f}  top-1 {top1:.2%}  top-5 {top5:.2%}".format(**line)
            self._print(step, name + text)
        self._pending.put((self._append, *lines))
        self._window.pause()

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
        self._window.add(metrics, data_seconds)
        text = _describe_training(self._window.means())
        self._bar.update(self._task, description="training", completed=step, metrics=text)

        if step % self._log_every_steps == 0 or step in self._line_steps:
            self._end_window(step)

    def flush(self, step: int) -> None:
        """Waits, and writes a line for the steps up to this one that have none yet."""
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
            {"epoch": round(line["step"] / self._steps_per_epoch, 3), **line} for line in lines
        ]
        self.lines += lines
        with _writing(self._workdir):
            for writer in self._writers:
                writer.write(lines)

    def _print(self, step: int, text: str) -> None:
        epoch = step / self._steps_per_epoch
        width = len(str(self._total_steps))
        epochs = len(f"{self._total_steps / self._steps_per_epoch:.1f}")
        say(f"step {step:>{width}}/{self._total_steps}  epoch {epoch:{epochs}.1f}  {text}")


def _describe_training(means: Mapping[str, float]) -> str:
    """The means of a `Window` in a few words."""
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


def _diverged(name: str, value: float, step: int, workdir: epath.Path) -> InputError:
    return InputError(
        f"the {name} is {value} at step {step}: the training diverged; the checkpoints before it "
        f"are kept in {workdir} (a lower optimizer.learning_rate, a longer warm-up or "
        "optimizer.clip_norm may help, with another --workdir)"
    )
