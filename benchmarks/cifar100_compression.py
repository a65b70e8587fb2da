"""The paper's compression curve: ResNet-50 and Sc-ResNet-50 on CIFAR-100, at seven ratios k.

    python benchmarks/cifar100_compression.py --config.dataset.data_dir=DIR \
        [--epochs N] [--width N] [--seeds N] [--models NAME@K ...] [--config.KEY=VALUE ...]

DIR is where TensorFlow Datasets keeps CIFAR-100, by default ~/tensorflow_datasets. Every model is
trained with every seed by train.py, in a process and a work directory of its own, with the recipe
of configs/cifar100_sc_resnet50.py. Its learning rate falls in steps over 200 epochs; for other
numbers of epochs it rises over the first tenth and falls as a cosine. --config.KEY=VALUE is for
train.py and holds for all models.

The same command continues where it was stopped, and skips what is finished; with more seeds or
models it adds them. After each run, results.json, results.md and compression.png in the work
directory are those of all runs that are finished.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags

import slimconv_jax as sc
from slimconv_jax.benchmark import describe_environment, environment
from slimconv_jax.console import Status, say
from slimconv_jax.errors import InputError, require_integer, run_script
from slimconv_jax.files import replace_file
from slimconv_jax.models.published import CIFAR100
from slimconv_jax.models.zoo import abstract_model, parse_model
from slimconv_jax.training.checkpoint import NOT_COMPARED
from slimconv_jax.training.report import read_metrics

ROOT = Path(__file__).parents[1]
BASELINE = "resnet50"
RECIPE_EPOCHS = 200
NUM_CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Run:
    """One model with one seed: its work directory, and what train.py is to change in the config."""

    model: str
    seed: int
    workdir: Path
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model}, seed {self.seed}"

    def result(self) -> dict | None:
        """What result.json says, if the run is finished, with these overrides."""
        try:
            result = json.loads((self.workdir / "result.json").read_text())
        except (OSError, ValueError):
            return None
        return result if result["overrides"] == self.learnt_from() else None

    def learnt_from(self) -> list[str]:
        """The overrides that what is learnt depends on."""
        keys = [text.removeprefix("--config.").split("=")[0] for text in self.overrides]
        return [
            text for text, key in zip(self.overrides, keys, strict=True) if key not in NOT_COMPARED
        ]


def config_file(model: str) -> Path:
    """The config of a model; one for SlimConvs has a k, which the other must not have."""
    return ROOT / f"configs/cifar100_{'sc_' if model.startswith('sc_') else ''}resnet50.py"


def recipe(model: str, args: argparse.Namespace) -> tuple[str, ...]:
    """What changes in the config for a model, all but the seed."""
    name, k = parse_model(model)
    settings = {"model.name": name, "model.width": args.width, "num_epochs": args.epochs}
    if k:
        settings["model.k"] = k
    if args.epochs != RECIPE_EPOCHS:
        settings["optimizer.schedule"] = "cosine"
        settings["optimizer.milestones"] = ()
        settings["optimizer.warmup_epochs"] = args.epochs / 10
    return (*(f"--config.{key}={value}" for key, value in settings.items()), *args.overrides)


def read_config(model: str, overrides: Sequence[str]) -> ConfigDict:
    """The config that train.py will see."""
    values = flags.FlagValues()
    command = ["train.py", f"--config={config_file(model)}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    try:
        values(command)
    except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        file = config_file(model).name
        raise InputError(f"configs/{file} does not go with the overrides: {reason}") from None
    return values["config"].value


def count(model: str, args: argparse.Namespace) -> dict[str, int]:
    """Parameters, and multiply-adds of an image, of a model as it will be trained."""
    config = read_config(model, recipe(model, args))
    network = abstract_model(num_classes=NUM_CLASSES, **config.model)
    size = config.transform.get("image_size") or 32
    return {"params": sc.count_params(network), "macs": sc.count_macs(network, size)}


class Trainer:
    """Trains runs in processes, several at once, until it is told to stop.

    Args:
      status: is told how far they are.
      jobs: how many at once. On CPUs each has its share of the cores.
    """

    def __init__(self, status: Status, jobs: int):
        self._status, self._processes, self._stopping = status, set(), False
        self._lock = threading.Lock()
        self._environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self._cores = queue.Queue()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        for job in range(jobs):
            self._cores.put(set(cores[job::jobs]) if jobs > 1 else None)
        if jobs > 1:  # which then share an accelerator's memory
            self._environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

    def train(self, run: Run) -> None:
        """Trains one to its end, and writes its result.json.

        Raises:
          ValueError: if train.py fails; the message has the end of what it said.
        """
        run.workdir.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, str(ROOT / "train.py"), f"--config={config_file(run.model)}"),
            *(*run.overrides, f"--workdir={run.workdir}"),
        ]
        cores = self._cores.get()
        start = time.perf_counter()
        with self._lock:
            if self._stopping:
                return
            # In a session of its own, so that Ctrl-C reaches this script alone, which then stops
            # it as a run wants to be stopped.
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env=self._environment,
            )
            self._processes.add(process)
        if cores:
            with contextlib.suppress(ProcessLookupError):  # it has failed already
                os.sched_setaffinity(process.pid, cores)
        said = []
        with process, (run.workdir / "train.log").open("a", buffering=1) as log:
            for line in process.stdout:
                log.write(line)
                said.append(line.strip())
                if line.startswith("step") and "test" in line:
                    self._status.update(f"{run}: {' '.join(line.split())}")
        self._cores.put(cores)
        with self._lock:
            self._processes.remove(process)
            if self._stopping:
                return
        if process.returncode != 0:
            raise InputError(f"the training of {run} failed: {' '.join(said[-3:])}")
        lines = read_metrics(run.workdir)
        test = [line for line in lines if line["split"] == "test"][-1]
        speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
        result = {
            "overrides": run.learnt_from(),
            "top1": test["top1"],
            "test_images": test["examples"],
            "images_per_second": statistics.median(speeds),
        }
        minutes = (time.perf_counter() - start) / 60
        replace_file(run.workdir / "result.json", json.dumps(result, indent=2).encode())
        say(f"{run}: top-1 {test['top1']:.2%}, {minutes:.1f} min")

    def stop(self) -> None:
        """Tells all that are under way to save and stop."""
        with self._lock:
            self._stopping = True
            for process in self._processes:
                process.terminate()


def train_all(runs: Sequence[Run], args: argparse.Namespace, report: "Report") -> None:
    """Trains what is not finished.

    Raises:
      ValueError: when one fails; what is under way beside it is saved and stopped.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    left = [run for run in runs if run.result() is None]
    say(f"{len(runs)} runs, {len(runs) - len(left)} of them finished")
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    with Status() as status:
        trainer = Trainer(status, args.jobs)
        try:
            for done in concurrent.futures.as_completed(
                [pool.submit(trainer.train, run) for run in left]
            ):
                done.result()
                report.write()
        except BaseException as error:
            status.update("saving and stopping")
            trainer.stop()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                say("stopped; the same command continues")
            raise
        finally:
            report.write()


class Report:
    """What the finished runs say, as JSON, a table and a figure."""

    def __init__(self, runs: Sequence[Run], counts: dict[str, dict], args: argparse.Namespace):
        self._runs, self._counts, self._args = runs, counts, args
        self._about = {"command": shlex.join(["python", *sys.argv]), **environment()}

    def budget(self) -> str:
        """The setting in words."""
        overrides = [text.removeprefix("--config.") for text in self._args.overrides]
        extra = "".join(f", {text}" for text in overrides if text.split("=")[0] not in NOT_COMPARED)
        schedule = "multistep" if self._args.epochs == RECIPE_EPOCHS else "cosine"
        return f"width {self._args.width}, {self._args.epochs} epochs ({schedule}){extra}"

    def rows(self) -> list[dict]:
        """For each model with a finished run what is known of it; accuracies are in percent."""
        results = {run: result for run in self._runs if (result := run.result())}
        top1 = {}
        for run, result in results.items():
            top1.setdefault(run.model, {})[run.seed] = 100 * result["top1"]
        baseline = top1.get(BASELINE, {})
        rows = []
        for model, by_seed in top1.items():
            counts = self._counts[model]
            gains = [by_seed[seed] - baseline[seed] for seed in by_seed if seed in baseline]
            speeds = [r["images_per_second"] for run, r in results.items() if run.model == model]
            rows.append(
                {
                    "model": model,
                    **counts,
                    "compression": 1 - counts["params"] / self._counts[BASELINE]["params"],
                    "top1_by_seed": by_seed,
                    "top1": statistics.mean(by_seed.values()),
                    "top1_sd": statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None,
                    "gain": statistics.mean(gains) if gains else None,
                    "gain_sd": statistics.stdev(gains) if len(gains) > 1 else None,
                    "published_top1": CIFAR100.get(model, (None, None))[1],
                    "images_per_second": statistics.median(speeds),
                }
            )
        return rows

    def write(self) -> None:
        """Writes results.json, results.md and compression.png."""
        rows, directory = self.rows(), Path(self._args.workdir)
        if not rows:
            return
        content = {**self._about, "budget": self.budget(), "models": rows}
        replace_file(directory / "results.json", (json.dumps(content, indent=2) + "\n").encode())
        replace_file(directory / "results.md", self.table(rows).encode())
        self.draw(rows, directory / "compression.png")

    def table(self, rows: Sequence[dict]) -> str:
        """A Markdown table."""

        def spread(row: dict, key: str, sign: str = "") -> str:
            if row[key] is None:
                return "-"
            sd = row[f"{key}_sd"]
            return f"{row[key]:{sign}.2f}" + ("" if sd is None else f" +- {sd:.2f}")

        lines = [
            f"{self.budget()}; {describe_environment(self._about)}",
            "",
            "| model | parameters | compression | MACs | seeds | top-1, % | against resnet50 "
            "| published top-1, % | images/s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            gain = "" if row["model"] == BASELINE else spread(row, "gain", "+")
            published = row["published_top1"]
            lines.append(
                f"| {row['model']} | {row['params']:,} | {row['compression']:.1%} "
                f"| {row['macs']:,} | {len(row['top1_by_seed'])} | {spread(row, 'top1')} | {gain} "
                f"| {published or ''} | {row['images_per_second']:,.0f} |"
            )
        return "\n".join([*lines, ""])

    def draw(self, rows: Sequence[dict], path: Path) -> None:
        """Top-1 against compression, published and here, one above the other."""
        figure = Figure(figsize=(7.5, 8), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        published = [(model, *point, 0) for model, point in CIFAR100.items()]
        here = [
            (row["model"], 100 * row["compression"], row["top1"], row["top1_sd"] or 0)
            for row in rows
        ]
        models = list(dict.fromkeys(model for model, *_ in published + here))
        draw_points(above, "published", published, models)
        draw_points(below, textwrap.fill(f"here: {self.budget()}", 90), here, models)
        above.legend(*merged_legend(above, below), loc="lower left", fontsize=9)
        label = "parameters saved against ResNet-50, %"
        seeds = max(len(row["top1_by_seed"]) for row in rows)
        if seeds > 1:
            label += f"\n(means and standard deviations of {seeds} seeds)"
        below.set_xlabel(label)
        figure.savefig(path, dpi=120)


def draw_points(
    ax: Axes,
    title: str,
    points: Sequence[tuple[str, float, float, float]],
    models: Sequence[str],
) -> None:
    """Draws models: their names, compression, top-1 and its standard deviation, in percent.

    The place of a model in `models` gives its colour.
    """
    for model, x, top1, sd in points:
        name, k = parse_model(model)
        color = colormaps["turbo"](0.05 + 0.9 * models.index(model) / max(len(models) - 1, 1))
        label = f"k = {k}" if name == "sc_resnet50" else Path(model).stem
        ax.errorbar(x, top1, yerr=sd, fmt="o" if k else "s", color=color, capsize=3, label=label)
        if model == BASELINE:
            ax.axhline(top1, color="0.7", linewidth=1, zorder=0)
    ax.set_title(title, loc="left", fontsize=9)
    ax.set_ylabel("top-1 on CIFAR-100, %")
    ax.grid(alpha=0.3)
    ax.margins(0.08, 0.1)


def merged_legend(*axes: Axes) -> tuple[list, list]:
    """The handles and labels of several axes, each label once."""
    entries = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return list(entries.values()), list(entries)


def main() -> None:
    usage = "%(prog)s [options] [--config.KEY=VALUE ...]"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=usage)
    add = parser.add_argument
    add(
        "--workdir",
        type=Path,
        default=Path("runs/cifar100_compression"),
        metavar="DIR",
        help="gets the results, and a work directory for each run (default: %(default)s)",
    )
    add(
        "--models",
        nargs="+",
        default=list(CIFAR100),
        metavar="NAME[@K]",
        help="(default: resnet50, and sc_resnet50 at the seven k of the figure)",
    )
    add("--epochs", type=int, default=RECIPE_EPOCHS, metavar="N", help="(default: %(default)s)")
    add(
        "--width",
        type=int,
        default=64,
        metavar="N",
        help="channels of the stem, and the others in proportion (default: 64)",
    )
    add("--seeds", type=int, default=1, metavar="N", help="0 to N-1 (default: 1)")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at once, on CPUs each with its share of the cores (default: 1)",
    )
    args, args.overrides = parser.parse_known_args()
    for text in args.overrides:
        if not text.startswith("--config.") or "=" not in text:
            parser.error(f"unrecognized argument {text}; those of train.py are --config.KEY=VALUE")
    for name in ("epochs", "width", "seeds", "jobs"):
        require_integer(f"--{name}", getattr(args, name), 1)
    with Status() as status:
        counts = {}
        for model in dict.fromkeys([BASELINE, *args.models]):
            status.update(f"counting {model}")
            counts[model] = count(model, args)
    runs = [
        Run(
            model,
            seed,
            args.workdir / f"{Path(model.replace('@', '_k').replace('/', '_')).stem}_seed{seed}",
            (*recipe(model, args), f"--config.seed={seed}"),
        )
        for seed in range(args.seeds)
        for model in dict.fromkeys(args.models)
    ]
    report = Report(runs, counts, args)
    train_all(runs, args, report)
    print((args.workdir / "results.md").read_text())
    print(f"in {args.workdir}: results.json, results.md, compression.png")


if __name__ == "__main__":
    run_script(main)
