"""A sweep on CIFAR-100: variants of a config, each trained with several seeds, side by side.

Every run is train.py in a process and a work directory of its own. The same sweep continues where
it was stopped, skips what is finished, and adds what is new. After each run, results.json has the
accuracy and the curves of those runs of the sweep that are finished, results.md a table, and
results.png a figure.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts import core_shares, environment_apart
from sweep_report import RESULT

import slimconv_jax as sc
from slimconv_jax.console import Status, say
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.files import read_json, replace_file
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.storage.work_directory import CONFIG, NOT_COMPARED, compared_keys
from slimconv_jax.training.config import default_values, read_config
from slimconv_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
NUM_CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Variant:
    """A config with a name.

    Attributes:
      name: in tables, and of the work directories.
      config: a config for train.py, such as "cifar100:resnet50".
      settings: the keys that change in it, and their values.
      published_top1: of the paper, in percent; None if there is none.
    """

    name: str
    config: str
    settings: dict[str, Any]
    published_top1: float | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """A variant with one seed.

    Attributes:
      variant: what is trained.
      seed: of the run.
      workdir: its work directory.
      overrides: what train.py is to change in the config.
      compared: the values of the config that what is learnt depends on.
      counts: parameters, and multiply-adds of an image.
    """

    variant: Variant
    seed: int
    workdir: Path
    overrides: tuple[str, ...]
    compared: dict[str, Any]
    counts: dict[str, int]

    def __str__(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """Returns its result.json, if it is complete, and not of another config or file."""
        try:
            result = read_json(self.workdir / "result.json")
            compared = compared_keys(read_json(self.workdir / CONFIG), default_values())
        except InputError:
            return None
        if not isinstance(result, dict) or result.keys() != set(RESULT):
            return None
        counts = {key: result[key] for key in self.counts}
        return result if (compared, counts) == (self.compared, self.counts) else None


def plan_runs(
    variants: Sequence[Variant], seeds: int, workdir: Path, overrides: Sequence[str] = ()
) -> list[Run]:
    """Plans the runs of a sweep: all variants with the first seed, then with the next.

    Args:
      variants: what to train.
      seeds: how many.
      workdir: gets a work directory for each run.
      overrides: what changes in every config, as --config.KEY=VALUE.

    Raises:
      ValueError: if a config cannot be used, or two of the runs have the same work directory.
    """
    runs, counts = [], {}
    with Status() as status:
        for seed in range(seeds):
            for variant in variants:
                status.update(f"counting {variant.name}")
                settings = variant.settings | {"seed": seed}
                options = (*(f"--config.{k}={v}" for k, v in settings.items()), *overrides)
                config = read_config(variant.config, options)
                if variant.name not in counts:
                    network = abstract_model(num_classes=NUM_CLASSES, **config.model)
                    macs = sc.count_macs(network, config.transform.image_size or 32)
                    counts[variant.name] = {"params": sc.count_params(network), "macs": macs}
                name = re.sub(r"[^\w.+-]+", "_", variant.name.replace("@", "_k"))
                compared = compared_keys(json.loads(config.to_json_best_effort()), default_values())
                place = workdir / f"{name}_seed{seed}"
                runs.append(Run(variant, seed, place, options, compared, counts[variant.name]))
    if len({run.workdir for run in runs}) < len(runs):
        raise InputError("two of the variants would have the same work directory; rename one")
    return runs


class Trainer:
    """Trains runs in processes, several at once, until it is told to stop.

    Args:
      status: is told how far they are.
      jobs: how many at once. On CPUs each has its share of the cores.
    """

    def __init__(self, status: Status, jobs: int):
        self._status, self._jobs, self._processes = status, jobs, set()
        self._where = environment_apart()
        self._lock, self._stopping = threading.Lock(), False
        # Huge pages, where the C library is glibc, make training on CPUs a fifth faster.
        huge_pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        self._environment = huge_pages | os.environ | {"PYTHONUNBUFFERED": "1"}
        self._cores = queue.Queue()
        for share in core_shares(jobs):
            self._cores.put(share)
        if jobs > 1:  # which then share an accelerator's memory
            self._environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

    def train(self, run: Run) -> None:
        """Trains one to its end, and writes its result.json, unless it is told to stop.

        Raises:
          ValueError: if train.py fails; the message has the end of what it said.
        """
        cores = self._cores.get()
        start = time.perf_counter()
        try:
            status, said = self._run(run, cores)
            if status is None or self._stopping:
                return
            if status != 0:
                self.stop()
                reason = [line for line in said if line.startswith("error: ")] or said[-3:]
                raise InputError(f"the training of {run} failed: {' '.join(reason)}")
            result = self._result(run)
            replace_file(run.workdir / "result.json", json.dumps(result).encode())
        except OSError as error:
            self.stop()
            raise InputError(f"cannot write to {run.workdir}: {error.strerror}") from None
        finally:
            self._cores.put(cores)
        minutes = (time.perf_counter() - start) / 60
        say(f"{run}: top-1 {result['top1']:.2%}, {minutes:.1f} min")

    def _result(self, run: Run) -> dict[str, Any]:
        lines = read_metrics(run.workdir)
        speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
        curves = {
            split: [
                [round(line["epoch"], 3), round(line["loss"], 4), round(line[accuracy], 4)]
                for line in lines
                if line["split"] == split
            ]
            for split, accuracy in (("train", "accuracy"), ("test", "top1"))
        }
        _, loss, top1 = curves["test"][-1]
        speed = statistics.median(speeds) if speeds else None
        values = (run.variant.name, run.seed, *run.counts.values(), top1, loss)
        values += (_last_epoch(lines), speed, self._jobs, self._where, curves)
        return dict(zip(RESULT, values, strict=True))

    def _run(self, run: Run, cores: set[int]) -> tuple[int | None, list[str]]:
        """Runs train.py; its exit status (None if it was not started) and what it said."""
        command = [
            *(sys.executable, str(ROOT / "train.py"), f"--config={run.variant.config}"),
            *(*run.overrides, f"--workdir={run.workdir}"),
        ]
        run.workdir.mkdir(parents=True, exist_ok=True)
        said = []
        with (run.workdir / "train.log").open("a", buffering=1) as log:
            with self._lock:
                if self._stopping:
                    return None, said
                # In a session of its own, so that Ctrl-C reaches this script alone, which then
                # stops it as a run wants to be stopped.
                process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                    env=self._environment,
                )
                self._processes.add(process)
            self._status.update(f"{run}: starting")
            if cores:
                with contextlib.suppress(ProcessLookupError):  # it has failed already
                    os.sched_setaffinity(process.pid, cores)
            try:
                with process:
                    for line in process.stdout:
                        said.append(line.strip())
                        log.write(line)
                        if line.startswith("step") and ("test" in line or sys.stderr.isatty()):
                            self._status.update(f"{run}: {' '.join(line.split())}")
            except OSError:
                process.terminate()
                raise
            finally:
                with self._lock:
                    self._processes.remove(process)
        return process.returncode, said

    def stop(self) -> None:
        """Asks every training that is running to save and stop."""
        with self._lock:
            self._stopping = True
            for process in self._processes:
                process.terminate()


def _last_epoch(lines: Sequence[dict]) -> float:
    """Returns the training accuracy of the last epoch; each line averages its own steps."""
    lines = [{"step": 0, "epoch": 0}, *(line for line in lines if line["split"] == "train")]
    spans = [
        (line["step"] - before["step"], line["accuracy"])
        for before, line in itertools.pairwise(lines)
        if line["epoch"] > lines[-1]["epoch"] - 1
    ]
    return round(sum(steps * value for steps, value in spans) / sum(s for s, _ in spans), 4)


def train_all(runs: Sequence[Run], jobs: int, report: Callable[[list[dict]], None]) -> None:
    """Trains what is not finished; after each run and at the end, reports all finished results.

    Raises:
      ValueError: when one fails; what is under way beside it is saved and stopped.
    """

    def report_finished() -> None:
        if finished := [result for run in runs if (result := run.result())]:
            report(finished)

    left = [run for run in runs if run.result() is None]
    say(f"{len(runs) - len(left)} of {len(runs)} runs are finished")
    if not left:
        report_finished()
        return
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    jobs = min(jobs, len(left))
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    with Status() as status:
        trainer = Trainer(status, jobs)
        try:
            for done in concurrent.futures.as_completed(
                [pool.submit(trainer.train, run) for run in left]
            ):
                done.result()
                report_finished()
        except BaseException as error:
            status.update("stopping")
            trainer.stop()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                say("stopped; the same command continues")
            raise
        finally:
            report_finished()


def describe_overrides(overrides: Sequence[str]) -> str:
    """Returns the changes of all configs in words, without those that do not change the result."""
    texts = [text.removeprefix("--config.") for text in overrides]
    return "".join(f", {text}" for text in texts if text.split("=")[0] not in NOT_COMPARED)


def add_options(parser: argparse.ArgumentParser, *, workdir: str, seeds: int) -> None:
    """Adds the options that all sweeps have; the arguments are their defaults."""
    add = parser.add_argument
    add(
        "--workdir",
        type=Path,
        default=Path(workdir),
        metavar="DIR",
        help="gets the results, and a work directory for each run (default: %(default)s)",
    )
    add("--seeds", type=int, default=seeds, metavar="N", help="0 to N-1 (default: %(default)s)")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at once, on CPUs each with its share of the cores (default: 1)",
    )


def parse_options(
    parser: argparse.ArgumentParser, reserved: Callable[[argparse.Namespace], Sequence[str]]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line; also returns the changes of all configs, as --config.KEY=VALUE.

    Args:
      parser: has the options of `add_options`.
      reserved: returns the keys that the sweep itself sets.

    Raises:
      ValueError: if a number is out of range.
    """
    args, overrides = parser.parse_known_args()
    for text in overrides:
        key = text.removeprefix("--config.").split("=")[0]
        if not text.startswith("--config.") or "=" not in text:
            parser.error(f"unrecognized argument {text}; those of train.py are --config.KEY=VALUE")
        if key in ("seed", *reserved(args)):
            parser.error(f"--config.{key} is for other options to say; see --help")
    for name in ("seeds", "jobs"):
        require_integer(f"--{name}", getattr(args, name), 1)
    return args, overrides
