"""The script of the compression curve, on digits in place of CIFAR-100."""

import argparse
import json
import os
import signal
import subprocess
import sys

import cifar100_compression as sweep
import compression_report
import pytest
from PIL import Image

from slimconv_jax.console import Status

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

SCRIPT = sweep.__file__
WHERE = {"date": "today", "device": "an abacus", "versions": {"python": "3"}}


def arguments(workdir, *more):
    return [
        *("--workdir", str(workdir), "--models", "resnet14", "--seeds", "2"),
        *("--epochs", "1", "--width", "8"),
        *("--config.dataset.name=digits", "--config.dataset.train_split=test"),
        *("--config.model.stem=imagenet", "--config.model.dtype=float32"),
        *more,
    ]


@pytest.fixture
def sweep_here(monkeypatch):
    """`main` of the script in this process, for the time that another start would take."""
    # The runs are processes of their own, which have one device.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setattr(sweep, "environment_apart", lambda: WHERE)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(arguments):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        sweep.run_script(sweep.main)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.process
def test_a_sweep_is_interrupted_and_continued(tmp_path, sweep_here, capsys):
    command = [sys.executable, SCRIPT, *arguments(tmp_path)]
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

    sweep_here(arguments(tmp_path))
    output = capsys.readouterr().out
    assert "1 of 2 runs are finished" in output
    assert (tmp_path / "resnet14_seed0/metrics.jsonl").read_bytes() == first
    (row,) = json.loads((tmp_path / "results.json").read_text())["models"]
    for seed in ("0", "1"):
        workdir = tmp_path / f"resnet14_seed{seed}"
        test = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["top1_by_seed"][seed] == 100 * test["top1"]
        assert f"top-1 {test['top1']:.2%}" in (workdir / "train.log").read_text()
    assert f"| resnet14 | {row['params']:,} |" in output


@pytest.fixture
def args(tmp_path):
    overrides = ["--config.model.stem=imagenet", "--config.dataset.data_dir=/data"]
    return argparse.Namespace(workdir=tmp_path, epochs=4, width=16, seeds=3, overrides=overrides)


def finish(run, top1, **changes):
    """Writes what a finished run leaves."""
    run.workdir.mkdir(exist_ok=True)
    config = sweep.read_config(sweep.config_of(run.model), run.overrides)
    (run.workdir / "config.json").write_text(config.to_json_best_effort())
    values = (run.model, run.seed, *run.counts.values(), top1, 100.0 + run.seed, 2, WHERE)
    result = dict(zip(compression_report.RESULT, values, strict=True)) | changes
    (run.workdir / "result.json").write_text(json.dumps(result))


@pytest.fixture
def report(args):
    baseline, *_ = sweep.plan("resnet50", args)
    return compression_report.Report(args.workdir, baseline.settings, 1000, "a budget")


def test_the_report(report, tmp_path, args):
    accuracies = {
        "ghost_resnet50": [0.19],
        "resnet50": [0.20, 0.22, 0.24],
        "sc_resnet50@4/3": [0.21, 0.24, 0.24],
    }
    for model, top1 in accuracies.items():
        for run, value in zip(sweep.plan(model, args), top1, strict=False):
            finish(run, value, params=600 if "@" in model else 1000)
    report.write()
    plain, slim, ghost = json.loads((tmp_path / "results.json").read_text())["models"]
    assert plain["top1"] == pytest.approx(22) and plain["top1_sd"] == pytest.approx(2)
    assert slim["compression"] == 0.4 and slim["published_top1"] == 78.5
    assert slim["top1"] == pytest.approx(23)
    assert slim["gain"] == pytest.approx(1) and slim["gain_sd"] == pytest.approx(1)
    assert ghost["gain"] == pytest.approx(-1) and ghost["gain_sd"] is None
    table = (tmp_path / "results.md").read_text()
    assert table.startswith("a budget.\n")
    start = f"| sc_resnet50@4/3 | 600 | 40.0% | {slim['macs']:,} | 3 |"
    assert f"{start} 23.00 ± 1.73 | +1.00 ± 1.00 | 78.5 | 101 |" in table
    assert (
        f"| ghost_resnet50 | 1,000 | 0.0% | {ghost['macs']:,} | 1 | 19.00 | -1.00 |  | 100 |"
        in table
    )
    assert table.endswith("Measured on an abacus, 2 runs at once (python 3).\n")
    with Image.open(tmp_path / "compression.png") as picture:
        assert picture.width > 500 and len(picture.getcolors(10**6)) > 100


def test_a_result_counts_for_its_own_settings_alone(report, args):
    run, other, _ = sweep.plan("resnet14", args)
    assert not run.is_finished()
    finish(run, 0.2)
    assert run.is_finished() and not other.is_finished()
    # Where the data are is not a part of them.
    args.overrides = [text.replace("/data", "/elsewhere") for text in args.overrides]
    assert sweep.plan("resnet14", args)[0].is_finished()
    assert [row["model"] for row in report.rows()] == ["resnet14"]
    finish(run, 0.2, params=1)  # of a file of channels that has changed
    assert not run.is_finished()
    finish(run, 0.2)
    args.epochs = 5
    (longer, *_) = sweep.plan("resnet14", args)
    assert not longer.is_finished()
    finish(longer, 0.3)
    assert report.rows() == []  # of another budget


@pytest.mark.parametrize("text", ["", "3", "null", "[]", "{}", '{"model": "resnet14"}'])
def test_a_damaged_result_is_none(args, text):
    (run, *_) = sweep.plan("resnet14", args)
    finish(run, 0.2)
    (run.workdir / "result.json").write_text(text)
    assert not run.is_finished()


@pytest.mark.process
def test_a_disk_that_is_full_stops_the_sweep(args, report, sweep_here):
    runs = sweep.plan("resnet14", args)
    for run in runs:
        run.workdir.mkdir()
        (run.workdir / "train.log").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"cannot write to .*resnet14_seed.: No space left"):
        sweep.train_all(runs, 2, report)


def test_two_at_once_have_their_share_of_the_cores(args, monkeypatch):
    cores = os.sched_getaffinity(0)
    monkeypatch.setattr(sweep, "environment_apart", lambda: WHERE)
    with Status() as status:
        trainer = sweep.Trainer(status, 2)
    shares = [trainer._cores.get(), trainer._cores.get()]
    assert shares[0] | shares[1] == cores and not shares[0] & shares[1]


def read_recipe(model, args):
    return sweep.read_config(sweep.config_of(model), sweep.recipe(model, args))


def test_the_recipe(args):
    config = read_recipe("sc_resnet50@8/3", args)
    assert (config.model.k, config.model.width, config.num_epochs) == ("8/3", 16, 4)
    assert (config.optimizer.schedule, config.optimizer.warmup_epochs) == ("cosine", 0.4)
    budget = sweep.describe_budget(config, args.overrides)
    assert budget == "width 16, 4 epochs (cosine), model.stem=imagenet"
    args.epochs = 200
    config = read_recipe("ghost_resnet50", args)
    assert config.model.name == "ghost_resnet50" and config.model.k is None
    assert config.optimizer.schedule == "multistep"
    assert config.optimizer.milestones == (60, 120, 160)


def test_a_file_of_channels_has_the_recipe_without_k(tmp_path):
    path = tmp_path / "sc_found.json"  # whatever its name
    path.write_text(json.dumps({"stem": 8, "stages": [[[8, 8, 32]]] * 4}))
    assert sweep.config_of(str(path)).endswith(f"/configs/cifar100.py:{path}")
    assert sweep.config_of("sc_resnet14@2").endswith("/configs/cifar100.py:sc_resnet14")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--width", "0"], "error: --width=0 must be an integer >= 1"),
        (
            ["--config.model.widht=8"],
            "error: config.model has no key 'widht' (did you mean 'width'?)",
        ),
        (["--models", "resnet51"], "error: unknown model 'resnet51'; did you mean resnet50"),
        (["--models", "resnet50@2"], "error: resnet50 has no SlimConv, so it takes no k"),
        (["--config.model.k=2"], "--config.model.k is for --models NAME@K, --width, --epochs"),
        (["--bogus"], "unrecognized argument --bogus; those of train.py are --config.KEY=VALUE"),
        pytest.param(
            ["--config.optimizer.learning_rate=-1", "--models", "resnet14"],
            "error: the training of resnet14, seed 0 failed: error: optimizer: learning_rate=-1.0",
            marks=pytest.mark.process,
        ),
    ],
)
def test_bad_input(tmp_path, sweep_here, capfd, more, message):
    with pytest.raises(SystemExit) as stopped:
        sweep_here(arguments(tmp_path, *more))
    said = f"{stopped.value.code}{capfd.readouterr().err}"  # a message, or a status and its reason
    assert stopped.value.code and message in said and "Traceback" not in said
    assert not (tmp_path / "results.json").exists()
