"""Sends a run's metrics to the services that its config names, none of which can stop the run.

A logger is a writer (see `slimconv_jax.training.writers`) that is created with the run. It also has
`close(status)`, which gets the exit status of the run: 0 at its end, more than 128 after a signal,
1 for an error. To add one, write its class and a row of `LOGGERS`.
"""

import contextlib
import functools
import importlib.util
import io
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath
from PIL import Image

from slimconv_jax.console import say
from slimconv_jax.errors import InputError, missing, require_choice
from slimconv_jax.files import is_address, read_text, replace_file
from slimconv_jax.storage.work_directory import PICTURE, RUN_ID, TENSORBOARD
from slimconv_jax.training.tensorboard import EventWriter, import_tensorboardx

PATIENCE = 60.0
"""Seconds that the end of a run waits for a logger."""

MOST_PENDING = 10_000
"""Calls that a logger may be behind; one that is further behind gets no more."""


class RunInfo(NamedTuple):
    """What a logger knows of its run.

    Attributes:
      workdir: of the run.
      config: of the run, as JSON has it, by flat key.
      title: what is trained, in a few words.
      first_step: steps done before.
      identity: from `identify`.
    """

    workdir: epath.Path
    config: dict[str, Any]
    title: str
    first_step: int
    identity: str

    def curves(self) -> Image.Image | None:
        """Returns `curves.png`, if there is one yet."""
        file = self.workdir / PICTURE
        return Image.open(io.BytesIO(file.read_bytes())) if file.exists() else None


def identify(workdir: epath.Path, first_step: int) -> str:
    """Returns a name for a run that it keeps when it continues, and no other run has.

    Raises:
      ValueError: if the file that has it is damaged.
    """
    file = workdir / RUN_ID
    if first_step and file.exists():
        try:
            text = read_text(file)
        except (OSError, UnicodeDecodeError):
            text = ""
        if re.fullmatch("[0-9a-f]{32}", text) is None:
            raise InputError(
                f"{file} is damaged: it has no 32 hexadecimal digits; without the file, loggers "
                "take the rest of the run for a new one"
            )
        return text
    replace_file(file, (identity := uuid.uuid4().hex).encode())
    return identity


class Wandb:
    """Weights & Biases; `WANDB_PROJECT`, `WANDB_MODE` and its other variables say where to."""

    def __init__(self, run: RunInfo):
        import wandb

        self._info, self._image = run, wandb.Image
        local = None if is_address(run.workdir) else os.fspath(run.workdir)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "slimconv_jax"),
            dir=os.environ.get("WANDB_DIR", local),
            id=run.identity,
            resume="allow",
            name=run.workdir.name,
            notes=run.title,
            config=run.config,
        )

    def write(self, lines: Sequence[dict]) -> None:
        """Sends the numbers of each line as SPLIT/NAME."""
        for line in lines:
            self._run.log(_numbers(line), step=line["step"])

    def close(self, status: int) -> None:
        """Sends the curves, and how the run ended."""
        if curves := self._info.curves():
            self._run.log({"curves": self._image(curves)})
        self._run.finish(exit_code=status)


class Mlflow:
    """MLflow; `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` say where to."""

    def __init__(self, run: RunInfo):
        import mlflow

        self._info, self._client = run, mlflow.MlflowClient()
        self._metric = mlflow.entities.Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "slimconv_jax")
        experiment = self._client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([place], f"tags.slimconv_jax = '{run.identity}'")
        tags = {"slimconv_jax": run.identity, "mlflow.note.content": run.title}
        name = run.workdir.name
        self._run = (found or [self._client.create_run(place, run_name=name, tags=tags)])[0]
        if found:
            self._client.update_run(self._run.info.run_id, status="RUNNING")
        else:
            values = [(key, str(value)[:500]) for key, value in run.config.items()]
            params = [mlflow.entities.Param(*pair) for pair in values]
            for start in range(0, len(params), 100):  # the most at once
                self._client.log_batch(self._run.info.run_id, params=params[start : start + 100])

    def write(self, lines: Sequence[dict]) -> None:
        """Sends the numbers of each line as SPLIT/NAME."""
        now = round(1000 * time.time())
        metrics = [
            self._metric(name, value, now, line["step"])
            for line in lines
            for name, value in _numbers(line).items()
        ]
        self._client.log_batch(self._run.info.run_id, metrics=metrics)

    def close(self, status: int) -> None:
        """Sends the curves, and how the run ended."""
        if curves := self._info.curves():
            self._client.log_image(self._run.info.run_id, curves, PICTURE)
        how = {0: "FINISHED", 1: "FAILED"}.get(status, "KILLED")
        self._client.set_terminated(self._run.info.run_id, how)


def _numbers(line: dict) -> dict[str, float]:
    """Returns the numbers of a line of metrics, as SPLIT/NAME."""
    names = [name for name in line if name not in ("step", "split")]
    return {f"{line['split']}/{name}": line[name] for name in names}


LOGGERS: dict[str, tuple[Callable[[RunInfo], Any], str]] = {
    "tensorboard": (
        lambda run: EventWriter(run.workdir / TENSORBOARD, first_step=run.first_step),
        "tensorboardX",
    ),
    "wandb": (Wandb, "wandb"),
    "mlflow": (Mlflow, "mlflow"),
}
"""For each name, what creates the logger of a run, and the module that it needs."""


def check_loggers(names: Sequence[str]) -> None:
    """Checks that there are loggers of these names, and that their packages are installed.

    Raises:
      ValueError: if not.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputError(f"config.loggers={names!r} must be a list of {', '.join(LOGGERS)}")
    for name in names:
        require_choice("config.loggers", name, LOGGERS)
        if importlib.util.find_spec(LOGGERS[name][1]) is None:
            raise InputError(missing(LOGGERS[name][1], extra=name))


class Detached:
    """A writer that hands everything to a logger in a thread of its own.

    If the logger raises or falls far behind, it gets no more, and the run goes on with a warning.

    Args:
      name: of the logger.
      create: creates it; called in the thread.
    """

    def __init__(self, name: str, create: Callable[[], Any]):
        self._name, self._given_up = name, False
        self._pending = queue.Queue(MOST_PENDING)
        arguments = {"target": self._run, "args": (create,), "name": f"logger {name}"}
        self._thread = threading.Thread(**arguments, daemon=True)
        self._thread.start()

    def _run(self, create: Callable[[], Any]) -> None:
        try:
            logger = create()
            while not isinstance(item := self._pending.get(), int):
                logger.write(item)
            logger.close(item)
        except (Exception, SystemExit) as error:  # others' code: of any kind
            self._give_up(f"failed: {' '.join(str(error).split()) or type(error).__name__}")

    def _give_up(self, reason: str) -> None:
        if not self._given_up:
            self._given_up = True
            say(f"warning: the logger {self._name} {reason}; the run goes on without it")
            with contextlib.suppress(queue.Empty):
                while True:
                    self._pending.get_nowait()
            self._pending.put_nowait(1)  # the thread closes the logger, if that still answers

    def write(self, lines: Sequence[dict]) -> None:
        """Hands lines over, unless the logger was given up."""
        self._put(list(lines))

    def close(self, status: int) -> None:
        """Tells the logger that the run has ended; see the module's docstring."""
        self._put(status)

    def wait(self, seconds: float) -> None:
        """Waits for the logger to finish, at most some seconds."""
        if self._given_up:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._give_up(f"has not finished after {PATIENCE:.0f} s")

    def _put(self, item: list[dict] | int) -> None:
        try:
            if not self._given_up:
                self._pending.put_nowait(item)
        except queue.Full:
            self._give_up(f"is {MOST_PENDING} writes behind")


class Loggers:
    """A writer that hands everything to several loggers.

    Args:
      names: of `LOGGERS`.
      run: what they know of it.
    """

    def __init__(self, names: Sequence[str], run: RunInfo):
        if "tensorboard" in names:
            import_tensorboardx()  # not in a thread, since it hides PyTorch from all of them
        self._loggers = [Detached(name, functools.partial(LOGGERS[name][0], run)) for name in names]

    def write(self, lines: Sequence[dict]) -> None:
        """Hands lines over."""
        for logger in self._loggers:
            logger.write(lines)

    def close(self, status: int) -> None:
        """Ends all loggers; waits `PATIENCE` seconds at most, for all together."""
        for logger in self._loggers:
            logger.close(status)
        deadline = time.monotonic() + PATIENCE
        for logger in self._loggers:
            logger.wait(max(deadline - time.monotonic(), 0))
