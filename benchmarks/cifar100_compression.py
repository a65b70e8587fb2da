"""The paper's compression curve: ResNet-50 and Sc-ResNet-50 on CIFAR-100, at seven ratios k.

    python benchmarks/cifar100_compression.py --config.dataset.data_dir=DIR \
        [--epochs N] [--width N] [--seeds N] [--models NAME@K ...] [--config.KEY=VALUE ...]

DIR is where TensorFlow Datasets keeps CIFAR-100, by default ~/tensorflow_datasets. Every model is
trained with every seed by train.py, in a process and a work directory of its own, with the recipe
of configs/cifar100.py. Its learning rate falls in steps over 200 epochs; for other
numbers of epochs it rises over the first tenth and falls as a cosine. --config.KEY=VALUE is for
train.py and holds for all models.

The same command continues where it was stopped, and skips what is finished; with more seeds or
other models it adds them. After each run, results.json, results.md and compression.png in the work
directory are those of all its finished runs of this budget, whichever call they are from.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from compression_report import BASELINE, OF_ONE_RUN, RESULT, Report, read_result
from ml_collections import ConfigDict
from scripts import core_shares, environment_apart, run_script

import slimconv_jax as sc
from slimconv_jax.console import Status, say
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.files import replace_file
from slimconv_jax.models.published import CIFAR100
from slimconv_jax.models.zoo import abstract_model, normalize_model, parse_model
from slimconv_jax.storage.work_directory import NOT_COMPARED, compared_keys
from slimconv_jax.training.config import default_values, read_config
from slimconv_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
RECIPE_EPOCHS = 200
NUM_CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Run:
    """One model with one seed.

    Attributes:
      model: NAME or NAME@K.
      seed: of the run.
      workdir: its work directory.
      overrides: what train.py is to change in the config.
      settings: the values of the config that what is learnt depends on.
      counts: parameters, and multiply-adds of an image.
    """

    model: str
    seed: int
    workdir: Path
    overrides: tuple[str, ...]
    settings: dict
    counts: dict[str, int]

    def __str__(self) -> str:
        return f"{self.model}, seed {self.seed}"

    def is_finished(self) -> bool:
        """Whether its work directory has its result, and not that of another config or file."""
        result = read_result(self.workdir, self.settings)
        return result is not None and all(result[key] == self.counts[key] for key in self.counts)


def config_of(model: str) -> str:
    """The config of a model."""
    return f"{ROOT}/configs/cifar100.py:{parse_model(model)[0]}"


def recipe(model: str, args: argparse.Namespace) -> tuple[str, ...]:
    """What changes in the config for a model, all but the seed."""
    _, k = parse_model(model)
    settings = {"model.width": args.width, "num_epochs": args.epochs}
    if k:
        settings["model.k"] = k
    if args.epochs != RECIPE_EPOCHS:
        settings["optimizer.schedule"] = "cosine"
        settings["optimizer.milestones"] = ()
        settings["optimizer.warmup_epochs"] = args.epochs / 10
    return (*(f"--config.{key}={value}" for key, value in settings.items()), *args.overrides)


def plan(model: str, args: argparse.Namespace) -> list[Run]:
    """The runs of a model, one for each seed."""
    counts = {}
    runs = []
    for seed in range(args.seeds):
        overrides = (*recipe(model, args), f"--config.seed={seed}")
        config = read_config(config_of(model), overrides)
        if not counts:
            network = abstract_model(num_classes=NUM_CLASSES, **config.model)
            size = config.transform.image_size or 32
            counts = {"params": sc.count_params(network), "macs": sc.count_macs(network, size)}
        name = Path(model).stem if model.endswith(".json") else model
        name = name.replace("@", "_k").replace("/", "_")
        settings = compared_keys(json.loads(config.to_json_best_effort()), default_values())
        workdir = args.workdir / f"{name}_seed{seed}"
        runs.append(Run(model, seed, workdir, overrides, settings, counts))
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
            lines = read_metrics(run.workdir)
            test = [line for line in lines if line["split"] == "test"][-1]
            speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
            values = (run.model, run.seed, *run.counts.values(), test["top1"])
            values += (statistics.median(speeds) if speeds else None, self._jobs, self._where)
            text = json.dumps(dict(zip(RESULT, values, strict=True)), indent=2)
            replace_file(run.workdir / "result.json", text.encode())
        except OSError as error:
            self.stop()
            raise InputError(f"cannot write to {run.workdir}: {error.strerror}") from None
        finally:
            self._cores.put(cores)
        minutes = (time.perf_counter() - start) / 60
        say(f"{run}: top-1 {test['top1']:.2%}, {minutes:.1f} min")

    def _run(self, run: Run, cores: set[int]) -> tuple[int | None, list[str]]:
        """Runs train.py; its exit status (None if it was not started) and what it said."""
        command = [
            *(sys.executable, str(ROOT / "train.py"), f"--config={config_of(run.model)}"),
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


def train_all(runs: Sequence[Run], jobs: int, report: Report) -> None:
    """Trains what is not finished.

    Raises:
      ValueError: when one fails; what is under way beside it is saved and stopped.
    """
    left = [run for run in runs if not run.is_finished()]
    say(f"{len(runs) - len(left)} of {len(runs)} runs are finished")
    if not left:
        report.write()
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
                report.write()
        except BaseException as error:
            status.update("stopping")
            trainer.stop()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                say("stopped; the same command continues")
            raise
        finally:
            report.write()


def describe_budget(config: ConfigDict, overrides: Sequence[str]) -> str:
    """The budget in words, with what else is not the recipe's."""
    texts = [text.removeprefix("--config.") for text in overrides]
    extra = "".join(f", {text}" for text in texts if text.split("=")[0] not in NOT_COMPARED)
    epochs = f"{config.num_epochs} epoch{'s' if config.num_epochs > 1 else ''}"
    return f"width {config.model.width}, {epochs} ({config.optimizer.schedule}){extra}"


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
        key = text.removeprefix("--config.").split("=")[0]
        if not text.startswith("--config.") or "=" not in text:
            parser.error(f"unrecognized argument {text}; those of train.py are --config.KEY=VALUE")
        if key in (*OF_ONE_RUN, "model.width", "num_epochs"):
            parser.error(
                f"--config.{key} is for --models NAME@K, --width, --epochs, --seeds to say"
            )
    for name in ("epochs", "width", "seeds", "jobs"):
        require_integer(f"--{name}", getattr(args, name), 1)
    args.models = list(dict.fromkeys(map(normalize_model, args.models)))
    with Status() as status:
        by_model = {}
        for model in dict.fromkeys([BASELINE, *args.models]):
            status.update(f"counting {model}")
            by_model[model] = plan(model, args)
    runs = [by_model[model][seed] for seed in range(args.seeds) for model in args.models]
    if len({run.workdir for run in runs}) < len(runs):
        raise InputError("two of the models would have the same work directory; rename a file")
    baseline, *_ = by_model[BASELINE]
    config = read_config(config_of(BASELINE), baseline.overrides)
    budget = describe_budget(config, args.overrides)
    report = Report(args.workdir, baseline.settings, baseline.counts["params"], budget)
    train_all(runs, args.jobs, report)
    print((args.workdir / "results.md").read_text())
    print(f"in {args.workdir}: results.json, results.md, compression.png")


if __name__ == "__main__":
    run_script(main)
