"""Whole runs on the digits, with a narrow model and two epochs of 22 or 23 steps."""

import json
import shutil

import jax
import pytest

from configs import digits
from slimconv_jax.training.loop import train


def small_config():
    config = digits.get_config()
    config.model.width = 8
    config.optimizer.warmup_epochs = 0.5
    config.num_epochs = 2
    config.eval_every_epochs = 1
    config.log_every_steps = 10
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on eight devices: its work directory and its result."""
    workdir = tmp_path_factory.mktemp("runs") / "eight"
    return workdir, train(small_config(), workdir)


def metrics(workdir, split):
    """The lines of a run, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second", None)
    return [line for line in lines if line["split"] == split]


def test_a_run_leaves_its_config_metrics_and_checkpoints(run):
    workdir, result = run
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "checkpoints",
        "metrics.jsonl",
    }
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"22", "45"}
    tests = metrics(workdir, "test")
    assert [line["step"] for line in tests] == [22, 45]
    assert [line["step"] for line in metrics(workdir, "train")] == [10, 20, 22, 30, 40, 45]
    assert result["examples"] == 360
    assert result["top1"] == result["correct"] / 360 == tests[-1]["top1"]
    losses = [line["loss"] for line in metrics(workdir, "train")]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow  # what test_step.py shows in float64, in whole runs
def test_one_device_and_eight_give_the_same_losses(tmp_path):
    # In float32 a sum in another order lets a ReLU here and there take the other side, and
    # with small feature maps each such turn changes the gradient by up to 1 %. With large maps
    # and a low rate it stays small; see test_step.py for float64.
    config = small_config()
    config.model.stem = "cifar"
    config.model.zero_init_residual = True
    config.optimizer.learning_rate = 0.001
    config.num_epochs = 1
    config.log_every_steps = 1
    losses = []
    for devices in (1, 8):
        workdir = tmp_path / str(devices)
        train(config, workdir, devices=jax.devices()[:devices])
        losses.append([line["loss"] for line in metrics(workdir, "train")[:20]])
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_an_interrupted_run_continues_to_the_same_result(run, tmp_path, capsys):
    # As after a kill between the two checkpoints: metrics went on, the checkpoint did not.
    workdir, result = run
    copy = shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "45")
    assert train(small_config(), copy) == result
    assert "continuing" in capsys.readouterr().out
    for split in ("train", "test"):
        assert metrics(copy, split) == metrics(workdir, split)


def test_a_complete_run_says_so_and_changes_nothing(run, capsys):
    workdir, result = run
    before = (workdir / "metrics.jsonl").stat().st_mtime_ns
    again = train(small_config(), workdir)
    assert {key: again[key] for key in result} == result
    assert "is complete, nothing to do: top-1" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("step", [22, 45])
def test_an_evaluation_that_an_interruption_took_is_made_up_for(run, tmp_path, step):
    # As after a kill between a checkpoint and the end of its evaluation.
    workdir, result = run
    copy = shutil.copytree(workdir, tmp_path / "copy")
    if step == 22:
        shutil.rmtree(copy / "checkpoints" / "45")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if f'"step": {step}, "split": "test"' not in line]
    assert len(kept) == len(lines) - 1
    (copy / "metrics.jsonl").write_text("".join(kept))
    assert train(small_config(), copy) == result
    assert metrics(copy, "test") == metrics(workdir, "test")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "k", "5", "must be 2r/3"),
        ("model", "name", "sc_resnet15", "did you mean"),
        ("dataset", "name", "mnist", "unknown data set 'mnist'"),
        ("model", "dtype", "bfloat17", "dtype='bfloat17' is no dtype"),
        ("model", "dilation", True, "must be three booleans"),
        ("augment", "crop_padding", -1, "crop_padding=-1"),
        ("normalize", "std", (1, 1, 0), "must be three numbers each"),
        ("optimizer", "learning_rate", -1.0, "learning_rate=-1.0"),
    ],
)
def test_a_bad_config_does_not_claim_the_work_directory(tmp_path, section, key, value, message):
    config = small_config()
    config[section][key] = value
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
