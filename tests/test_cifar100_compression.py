"""The script of the compression curve, on digits in place of CIFAR-100."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

SCRIPT = Path(__file__).parents[1] / "benchmarks/cifar100_compression.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("cifar100_compression", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its data classes look for themselves
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def arguments(workdir, *more):
    return [
        *("--workdir", str(workdir), "--models", "resnet14", "--seeds", "2"),
        *("--epochs", "1", "--width", "8"),
        *("--config.dataset.name=digits", "--config.dataset.train_split=test"),
        *("--config.model.stem=imagenet", "--config.model.dtype=float32"),
        *more,
    ]


def test_a_sweep_is_interrupted_and_continued(tmp_path):
    command = [sys.executable, str(SCRIPT), *arguments(tmp_path)]
    one_device = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": one_device}
    with subprocess.Popen(command, **pipe) as process:
        for line in process.stdout:
            if line.startswith("resnet14, seed 0: top-1"):
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "the same command continues" in output and errors.endswith("interrupted\n")
    assert not (tmp_path / "resnet14_seed1/result.json").exists()
    first = (tmp_path / "resnet14_seed0/metrics.jsonl").read_bytes()
    (row,) = json.loads((tmp_path / "results.json").read_text())["models"]
    assert list(row["top1_by_seed"]) == ["0"] and row["top1_sd"] is None

    done = subprocess.run(command, capture_output=True, text=True, check=True, env=one_device)
    assert "2 runs, 1 of them finished" in done.stdout
    assert (tmp_path / "resnet14_seed0/metrics.jsonl").read_bytes() == first
    (row,) = json.loads((tmp_path / "results.json").read_text())["models"]
    for seed in ("0", "1"):
        workdir = tmp_path / f"resnet14_seed{seed}"
        test = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["top1_by_seed"][seed] == 100 * test["top1"]
        assert f"top-1 {test['top1']:.2%}" in (workdir / "train.log").read_text()
    assert f"| resnet14 | {row['params']:,} |" in done.stdout


def finished(script, workdir, args, accuracies):
    """Runs that are finished, with these accuracies by model and seed."""
    runs = []
    for seed in range(args.seeds):
        for model in accuracies:
            name = model.replace("@", "_k").replace("/", "_")
            overrides = (*script.recipe(model, args), f"--config.seed={seed}")
            run = script.Run(model, seed, workdir / f"{name}_seed{seed}", overrides)
            runs.append(run)
            if accuracies[model][seed] is None:
                continue
            run.workdir.mkdir()
            result = {"overrides": run.learnt_from(), "top1": accuracies[model][seed]}
            result |= {"test_images": 10, "images_per_second": 100.0 + seed}
            (run.workdir / "result.json").write_text(json.dumps(result))
    return runs


@pytest.fixture
def args(tmp_path):
    overrides = ["--config.model.stem=imagenet", "--config.dataset.data_dir=/data"]
    return argparse.Namespace(workdir=tmp_path, epochs=4, width=16, seeds=3, overrides=overrides)


def test_the_report(script, tmp_path, args):
    accuracies = {
        "resnet50": [0.20, 0.22, 0.24],
        "sc_resnet50@4/3": [0.21, 0.24, 0.24],
        "ghost_resnet50": [0.19, None, None],
    }
    counts = {
        "resnet50": {"params": 1000, "macs": 9},
        "sc_resnet50@4/3": {"params": 600, "macs": 5},
        "ghost_resnet50": {"params": 500, "macs": 4},
    }
    report = script.Report(finished(script, tmp_path, args, accuracies), counts, args)
    report.write()
    plain, slim, ghost = json.loads((tmp_path / "results.json").read_text())["models"]
    assert plain["top1"] == pytest.approx(22) and plain["top1_sd"] == pytest.approx(2)
    assert slim["compression"] == 0.4 and slim["published_top1"] == 78.5
    assert slim["top1"] == pytest.approx(23)
    assert slim["gain"] == pytest.approx(1) and slim["gain_sd"] == pytest.approx(1)
    assert ghost["gain"] == pytest.approx(-1) and ghost["gain_sd"] is None
    table = (tmp_path / "results.md").read_text()
    assert table.startswith("width 16, 4 epochs (cosine), model.stem=imagenet; ")
    assert (
        "| sc_resnet50@4/3 | 600 | 40.0% | 5 | 3 | 23.00 +- 1.73 | +1.00 +- 1.00 | 78.5 | 101 |"
    ) in table
    assert "| ghost_resnet50 | 500 | 50.0% | 4 | 1 | 19.00 | -1.00 |  | 100 |" in table
    with Image.open(tmp_path / "compression.png") as picture:
        assert picture.width > 500 and len(picture.getcolors(10**6)) > 100


def test_a_result_counts_for_its_own_settings_alone(script, tmp_path, args):
    (run, *_) = finished(script, tmp_path, args, {"resnet50": [0.2, 0.2, 0.2]})
    assert run.result()["top1"] == 0.2
    # Where the data are is no part of them.
    moved = tuple(text.replace("/data", "/elsewhere") for text in run.overrides)
    assert script.dataclasses.replace(run, overrides=moved).result()
    longer = tuple(text.replace("num_epochs=4", "num_epochs=5") for text in run.overrides)
    assert script.dataclasses.replace(run, overrides=longer).result() is None


def test_the_recipe(script, args):
    config = script.read_config("sc_resnet50@8/3", script.recipe("sc_resnet50@8/3", args))
    assert (config.model.k, config.model.width, config.num_epochs) == ("8/3", 16, 4)
    assert (config.optimizer.schedule, config.optimizer.warmup_epochs) == ("cosine", 0.4)
    args.epochs = 200
    config = script.read_config("ghost_resnet50", script.recipe("ghost_resnet50", args))
    assert config.model.name == "ghost_resnet50" and "k" not in config.model
    assert config.optimizer.schedule == "multistep"
    assert config.optimizer.milestones == (60, 120, 160)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--width", "0"], "error: --width=0 must be an integer >= 1"),
        (["--config.model.widht=8"], "error: configs/cifar100_resnet50.py does not go with"),
        (["--models", "resnet51"], "error: unknown model 'resnet51'; did you mean resnet50"),
        (["--bogus"], "unrecognized argument --bogus; those of train.py are --config.KEY=VALUE"),
        (
            ["--config.optimizer.learning_rate=-1", "--models", "resnet14"],
            "error: the training of resnet14, seed 0 failed: error: optimizer: learning_rate=-1.0",
        ),
    ],
)
def test_bad_input(script, tmp_path, monkeypatch, capfd, more, message):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments(tmp_path, *more)])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        script.run_script(script.main)
    signal.signal(signal.SIGTERM, handler)
    said = f"{stopped.value.code}{capfd.readouterr().err}"  # a message, or a status and its reason
    assert stopped.value.code and message in said and "Traceback" not in said
    assert not (tmp_path / "results.json").exists()
