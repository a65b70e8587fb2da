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
import math
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

import scipy.stats
from scripts import core_shares, environment_apart

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

RESULT = (
    *("variant", "seed", "params", "macs", "top1", "loss", "train_accuracy", "images_per_second"),
    *("jobs", "where", "curves"),
)
"""What is in a result.json; `curves` has a list [epoch, loss, accuracy] of lists for each split."""


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
        self._environment = os.environ | {"PYTHONUNBUFFERED": "1"}
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


def summarize(results: Sequence[dict], baseline: str) -> list[dict[str, Any]]:
    """Returns a row for each variant, in their order; accuracies are in percent.

    A `gain` is the mean of the differences in top-1 from the baseline, seed by seed; `gain_ci` is
    half of the width of its 95 % confidence interval, by Student's t distribution. `compression`
    is the share of the baseline's parameters that a variant saves.
    """
    rows = []
    whole = next((r["params"] for r in results if r["variant"] == baseline), math.nan)
    of_baseline = {r["seed"]: r for r in results if r["variant"] == baseline}
    for variant in dict.fromkeys(result["variant"] for result in results):
        runs = [result for result in results if result["variant"] == variant]
        pairs = [(run, of_baseline[run["seed"]]) for run in runs if run["seed"] in of_baseline]
        gains = [100 * (run["top1"] - other["top1"]) for run, other in pairs]
        speeds = [run["images_per_second"] for run in runs if run["images_per_second"]]
        row = {key: runs[0][key] for key in ("variant", "params", "macs")}
        row |= {"seeds": len(runs), "images_per_second": statistics.median(speeds or [math.nan])}
        for key in ("top1", "train_accuracy"):
            row[key], row[f"{key}_sd"] = _mean_and_sd([100 * run[key] for run in runs])
        row["loss"], row["loss_sd"] = _mean_and_sd([run["loss"] for run in runs])
        gain, sd = _mean_and_sd(gains)
        quantile = scipy.stats.t.ppf(0.975, max(len(gains) - 1, 1))
        row |= {"gain": gain, "gain_ci": quantile * sd / math.sqrt(max(len(gains), 1))}
        row["compression"] = 1 - row["params"] / whole
        rows.append(row)
    return rows


def _mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    mean = statistics.mean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def table(rows: Sequence[dict], baseline: str, published: dict[str, float]) -> str:
    """Returns rows of `summarize` as a Markdown table."""
    columns = ["model", "parameters", "compression", "MACs", "seeds", "training accuracy, %"]
    columns += ["test loss", "top-1, % (± sd)", f"against {baseline} (95 % interval)"]
    columns += ["published top-1, %", "images/s"] if published else ["images/s"]
    lines = [_row(columns), _row(["---"] * len(columns))]
    for row in rows:
        cells = [row["variant"], f"{row['params']:,}", f"{row['compression']:.1%}"]
        cells += [f"{row['macs']:,}", f"{row['seeds']}", f"{row['train_accuracy']:.1f}"]
        cells += [f"{row['loss']:.3f}", _spread(row["top1"], row["top1_sd"])]
        cells += ["" if row["variant"] == baseline else _spread(row["gain"], row["gain_ci"], "+")]
        cells += [str(published.get(row["variant"], ""))] if published else []
        cells += [f"{row['images_per_second']:,.0f}"]
        lines.append(_row("-" if cell.lstrip("+").startswith("nan") else cell for cell in cells))
    return "\n".join(lines) + "\n"


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(value: float, spread: float, sign: str = "") -> str:
    return f"{value:{sign}.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}")


NOTE = """Compression: parameters saved against {baseline}. Training accuracy: in the last epoch, on
augmented images. Top-1: after the last epoch, mean and standard deviation over the seeds. Against
{baseline}: mean of the differences, seed by seed where both are finished, and its 95 % confidence
interval. Images/s: in training."""


def write_report(
    results: Sequence[dict],
    path: Path,
    *,
    title: str,
    baseline: str,
    published: dict[str, float],
    draw: Callable[[Sequence[dict], Sequence[dict], Path], None],
) -> None:
    """Writes the results, a table of them and a figure.

    Args:
      results: of the finished runs.
      path: of the JSON file; the table and the figure get the same name, with .md and .png.
      title: what the sweep is and its budget, in words.
      baseline: the variant that the others are compared with.
      published: top-1 of the paper by variant, in percent.
      draw: is called with the results, the rows of `summarize`, and the path of the figure.

    Raises:
      ValueError: if the files cannot be written.
    """
    rows = summarize(results, baseline)
    lines = ",\n".join(f"  {json.dumps(result)}" for result in results)
    content = f'{{"title": {json.dumps(title)},\n "runs": [\n{lines}\n]}}\n'
    machines = sorted({_describe_machine(result) for result in results})
    text = f"{title}\n\n{table(rows, baseline, published)}\n{NOTE.format(baseline=baseline)}\n\n"
    text += "".join(f"Measured on {machine}.\n" for machine in machines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.encode())
        replace_file(path.with_suffix(".md"), text.encode())
        draw(results, rows, path.with_suffix(".png"))
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror}") from None


def read_results(path: Path) -> tuple[str, list[dict]]:
    """Reads the title and the results in a JSON file of `write_report`.

    Raises:
      ValueError: if there is no such file, or it is damaged.
    """
    content = read_json(path)
    content = content if isinstance(content, dict) else {}
    title, results = content.get("title"), content.get("runs")
    if not results or any(not isinstance(r, dict) or r.keys() != set(RESULT) for r in results):
        raise InputError(f"{path} has no results of a sweep")
    return title, results


def _describe_machine(result: dict) -> str:
    where, jobs = result["where"], result["jobs"]
    packages = (f"{name} {version}" for name, version in where["versions"].items())
    at_once = f", {jobs} runs at once" if jobs > 1 else ""
    return f"{where['device']}{at_once} ({', '.join(packages)})"


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
    parser: argparse.ArgumentParser, reserved: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line; also returns the changes of all configs, as --config.KEY=VALUE.

    Args:
      parser: has the options of `add_options`.
      reserved: the keys that the sweep itself sets.

    Raises:
      ValueError: if a number is out of range.
    """
    args, overrides = parser.parse_known_args()
    for text in overrides:
        key = text.removeprefix("--config.").split("=")[0]
        if not text.startswith("--config.") or "=" not in text:
            parser.error(f"unrecognized argument {text}; those of train.py are --config.KEY=VALUE")
        if key in ("seed", *reserved):
            parser.error(f"--config.{key} is for other options to say; see --help")
    for name in ("seeds", "jobs"):
        require_integer(f"--{name}", getattr(args, name), 1)
    return args, overrides
