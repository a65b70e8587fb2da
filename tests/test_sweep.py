"""The sweeps of benchmarks/: the compression curve and the studies, on digits, not on CIFAR-100."""

import json
import os
import signal
import subprocess
import sys

import ablation
import cifar100_compression
import pytest
import sweep
import sweep_report
from PIL import Image

import slimconv_jax as sc
from slimconv_jax.console import Status
from slimconv_jax.errors import InputError
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.training.config import read_config

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

SCRIPT = cifar100_compression.__file__
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
        cifar100_compression.run_script(cifar100_compression.main)

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
    _, (only,) = sweep_report.read_results(tmp_path / "results.json")
    assert only["seed"] == 0 and len(only["curves"]["test"]) == 1

    sweep_here(arguments(tmp_path))
    output = capsys.readouterr().out
    assert "1 of 2 runs are finished" in output
    assert (tmp_path / "resnet14_seed0/metrics.jsonl").read_bytes() == first
    _, results = sweep_report.read_results(tmp_path / "results.json")
    for seed, result in enumerate(results):
        workdir = tmp_path / f"resnet14_seed{seed}"
        test = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        assert result["top1"] == round(test["top1"], 4) == result["curves"]["test"][-1][2]
        assert f"top-1 {test['top1']:.2%}" in (workdir / "train.log").read_text()
    assert len(results) == 2 and f"| resnet14 | {results[0]['params']:,} |" in output


VARIANTS = [
    sweep.Variant(name, "cifar100:resnet14", {"model.width": 8, "num_epochs": n})
    for name, n in (("first", 3), ("second one", 4))
]


def finish(run, top1, **changes):
    """Writes what a finished run leaves."""
    run.workdir.mkdir(exist_ok=True, parents=True)
    config = read_config(run.variant.config, run.overrides)
    (run.workdir / "config.json").write_text(config.to_json_best_effort())
    curves = {"train": [[0.5, 3, 0.1], [1, 2, 0.9]], "test": [[1, 2.5, top1]]}
    values = (run.variant.name, run.seed, *run.counts.values(), top1, 2.5, 0.9, 100.0 + run.seed)
    result = dict(zip(sweep_report.RESULT, (*values, 2, WHERE, curves), strict=True)) | changes
    (run.workdir / "result.json").write_text(json.dumps(result))


@pytest.fixture
def runs(tmp_path):
    return sweep.plan_runs(VARIANTS, 3, tmp_path, ["--config.dataset.data_dir=/data"])


def test_rows_and_their_table(runs):
    top1 = {"first": [0.20, 0.22, 0.24], "second one": [0.21, 0.24, 0.24]}
    for run in runs:
        params = 600 if run.variant is VARIANTS[1] else 1000
        finish(run, top1[run.variant.name][run.seed], params=params)
    results = [json.loads((run.workdir / "result.json").read_text()) for run in runs]
    plain, slim = sweep_report.summarize(results, "first")
    assert plain["top1"] == pytest.approx(22) and plain["top1_sd"] == pytest.approx(2)
    assert slim["compression"] == 0.4 and slim["top1"] == pytest.approx(23)
    # Student's t at 97.5 % with two degrees of freedom is 4.303.
    assert slim["gain"] == pytest.approx(1)
    assert slim["gain_ci"] == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    table = sweep_report.table([plain, slim], "first", {"second one": 78.5})
    start = f"| second one | 600 | 40.0% | {slim['macs']:,} | 3 | 90.0 | 2.500 |"
    assert f"{start} 23.00 ± 1.73 | +1.00 ± 2.48 | 78.5 | 101 |\n" in table
    (alone,) = sweep_report.summarize(results[1:2], "first")
    row = sweep_report.table([alone], "first", {}).splitlines()[-1]
    assert row.endswith("| 1 | 90.0 | 2.500 | 21.00 | - | 100 |") and "| 600 | - |" in row


def test_the_training_accuracy_is_that_of_the_last_epoch():
    lines = [(100, 1.0, 0.1), (150, 1.5, 0.4), (200, 2.0, 0.6), (210, 2.1, 0.9)]
    lines = [dict(zip(("step", "epoch", "accuracy"), line, strict=True)) for line in lines]
    lines = [line | {"split": "train"} for line in lines] + [{"split": "test"}]
    assert sweep._last_epoch(lines) == round((50 * 0.4 + 50 * 0.6 + 10 * 0.9) / 110, 4)


def test_a_result_counts_for_its_own_settings_alone(runs, tmp_path):
    run, other, *_ = runs
    assert run.result() is None
    finish(run, 0.2)
    assert run.result()["top1"] == 0.2 and other.result() is None
    # Where the data are is not a part of them.
    elsewhere, *_ = sweep.plan_runs(VARIANTS, 1, tmp_path, ["--config.dataset.data_dir=/other"])
    assert elsewhere.result() == run.result()
    longer, *_ = sweep.plan_runs(VARIANTS, 1, tmp_path, ["--config.num_epochs=5"])
    assert longer.workdir == run.workdir and longer.result() is None
    finish(run, 0.2, params=1)  # of a file of channels that has changed
    assert run.result() is None


@pytest.mark.parametrize("text", ["", "3", "null", "[]", "{}", '{"variant": "first"}'])
def test_a_damaged_result_is_none(runs, text):
    finish(runs[0], 0.2)
    (runs[0].workdir / "result.json").write_text(text)
    assert runs[0].result() is None


def test_variants_do_not_share_a_directory(tmp_path):
    same = [sweep.Variant(name, "cifar100:resnet14", {}) for name in ("a b", "a/b")]
    with pytest.raises(ValueError, match="two of the variants would have the same work directory"):
        sweep.plan_runs(same, 1, tmp_path)


@pytest.mark.process
def test_a_disk_that_is_full_stops_the_sweep(runs):
    for run in runs:
        run.workdir.mkdir()
        (run.workdir / "train.log").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"cannot write to .*_seed.: No space left"):
        sweep.train_all(runs, 2, lambda results: None)


def test_two_at_once_have_their_share_of_the_cores(monkeypatch):
    cores = os.sched_getaffinity(0)
    monkeypatch.setattr(sweep, "environment_apart", lambda: WHERE)
    with Status() as status:
        trainer = sweep.Trainer(status, 2)
    shares = [trainer._cores.get(), trainer._cores.get()]
    assert shares[0] | shares[1] == cores and not shares[0] & shares[1]


def config_of(variant):
    return read_config(variant.config, [f"--config.{k}={v}" for k, v in variant.settings.items()])


def test_the_recipe_of_the_compression_curve():
    variant = cifar100_compression.variant_of("sc_resnet50@8/3", 4, 16)
    assert variant.published_top1 == 78.1
    config = config_of(variant)
    assert (config.model.k, config.model.width, config.num_epochs) == ("8/3", 16, 4)
    assert (config.optimizer.schedule, config.optimizer.warmup_epochs) == ("cosine", 0.4)
    overrides = ["--config.model.stem=imagenet", "--config.dataset.data_dir=/data"]
    budget = cifar100_compression.describe_budget(4, 16, overrides)
    assert budget == "width 16, 4 epochs (cosine), model.stem=imagenet"
    config = config_of(cifar100_compression.variant_of("ghost_resnet50", 200, 64))
    assert config.model.name == "ghost_resnet50" and config.model.k is None
    assert config.optimizer.schedule == "multistep"
    assert config.optimizer.milestones == (60, 120, 160)


def test_a_file_of_channels_has_the_recipe_without_k(tmp_path):
    path = tmp_path / "sc_found.json"  # whatever its name
    path.write_text(json.dumps({"stem": 8, "stages": [[[8, 8, 32]]] * 4}))
    variant = cifar100_compression.variant_of(str(path), 4, 16)
    assert variant.config.endswith(f"/configs/cifar100.py:{path}")
    assert variant.name == "sc_found" and "model.k" not in variant.settings


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("gate16", "time") else pytest.mark.long)
        for name in ablation.STUDIES
    ],
)
def test_a_study_can_be_planned_and_drawn(name, tmp_path, monkeypatch, capsys):
    study = ablation.STUDIES[name]
    assert study.baseline in study.variants
    variants = ablation.variants_of(study)
    configs = [config_of(variant) for variant in variants]
    assert len({config.to_json_best_effort() for config in configs}) == len(variants)
    if name.startswith("gating"):  # what its question says
        models = [abstract_model(num_classes=100, **config.model) for config in configs]
        macs = dict(zip(study.variants, [sc.count_macs(m, 32) for m in models], strict=True))
        assert macs["resnet50, width 26"] == pytest.approx(macs["k=4/3"], rel=0.02)
    where = {"params": 10, "macs": 10, "images_per_second": None, "jobs": 1, "where": WHERE}
    curves = {"train": [[1, 4, 0.1], [2, 3, 0.3]], "test": [[2, 3, 0.2]]}
    results = [
        where
        | {"variant": v.name, "seed": seed, "top1": 0.2 + seed / 100, "loss": 3.0}
        | {"train_accuracy": 0.3, "curves": curves}
        for seed in range(2)
        for v in variants
    ]
    given = tmp_path / "given.json"
    given.write_text(json.dumps({"title": "As it was.", "runs": results}))
    monkeypatch.setattr(sys, "argv", ["ablation.py", name, "--results", str(given)])
    ablation.main()
    assert "As it was." in (text := capsys.readouterr().out)
    assert f"| {study.baseline} | 10 | 0.0% | 10 | 2 | 30.0 | 3.000 | 20.50 ± 0.71 |  | - |" in text
    assert sweep_report.read_results(given) == ("As it was.", results)
    with Image.open(given.with_suffix(".png")) as picture:
        assert picture.width > 500 and len(picture.getcolors(10**6)) > 100

    # Two seeds: a difference of 0.032 in one of them is 1.6 points of the mean.
    expected = tmp_path / "expected.json"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--expect", str(expected)])
    for better in (0.028, 0.032):
        last = results[-1] | {"top1": results[-1]["top1"] + better}
        expected.write_text(json.dumps({"title": "Before.", "runs": [*results[:-1], last]}))
        if better < 0.03:
            ablation.main()
        else:
            with pytest.raises(InputError, match="learns worse: top-1 20"):
                ablation.main()


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
        (["--config.model.k=2"], "--config.model.k is for other options to say; see --help"),
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
