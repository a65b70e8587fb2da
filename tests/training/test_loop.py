"""Whole runs on the digits, with a narrow model and two epochs of 22 or 23 steps."""

import json
import shutil

import jax
import pytest
from image_files import encode, smooth, write_folder

from configs import digits
from slimconv_jax.data.sources import load_source
from slimconv_jax.evaluation import evaluate_saved
from slimconv_jax.saving import load_model, read_info
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
        line.pop("data_wait", None)
    return [line for line in lines if line["split"] == split]


def test_a_run_leaves_its_config_metrics_and_checkpoints(run):
    workdir, result = run
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "model.json",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "curves.png",
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
        ("dataset", "test_split", "val", "digits has no split 'val'"),
        ("transform", "image_size", 0, "image_size=0 must be an integer"),
        ("loader", "on_error", "ignore", "on_error='ignore' must be"),
        ("augment", "flip", "yes", "flip='yes' must be True or False"),
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


def test_a_batch_larger_than_the_data_set_is_refused(tmp_path):
    config = small_config()
    config.batch_size = 1440
    with pytest.raises(
        ValueError, match=r"only 1437 images to train on, fewer than config.batch_size=1440"
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_left_out_do_not_count(tmp_path):
    files = {f"a/{i}.png": encode(smooth(32, 32, seed=i)) if i < 5 else b"" for i in range(20)}
    write_folder(tmp_path, "train", files)
    config = small_config()
    config.dataset = {"name": "image_folder", "data_dir": str(tmp_path), "test_split": "train"}
    config.loader.on_error = "skip"
    config.batch_size = 8
    with pytest.raises(
        ValueError, match=r"only 5 images to train on, fewer than config.batch_size=8"
    ):
        train(config, tmp_path / "run")


def test_the_work_directory_is_a_saved_model(run):
    workdir, result = run
    assert read_info(workdir) == {
        "class_names": list("0123456789"),
        "preprocessing": {
            "image_size": None,
            "mean": [0.306, 0.306, 0.306],
            "std": [0.324, 0.324, 0.324],
        },
    }
    model = load_model(workdir)
    assert model.config.width == 8 and model.stem.bn.use_running_average
    for batch_size in (64, 1000):
        again = evaluate_saved(workdir, load_source("digits", "test"), batch_size=batch_size)
        assert {key: again[key] for key in ("correct", "correct_top5", "examples")} == {
            key: result[key] for key in ("correct", "correct_top5", "examples")
        }
        assert again["loss"] == pytest.approx(result["loss"], rel=1e-6)


def test_other_classes_than_before_are_refused(run, tmp_path):
    workdir, _ = run
    copy = shutil.copytree(workdir, tmp_path / "copy")
    description = json.loads((copy / "model.json").read_text())
    description["class_names"][3] = "drei"
    (copy / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"the classes of the data are not those that .*/copy was"):
        train(small_config(), copy)


def test_photos_with_an_unreadable_one_among_them(tmp_path, capsys):
    files = {f"{name}/{i}.jpg": encode(smooth(40, 50, seed=i)) for name in "ab" for i in range(8)}
    write_folder(tmp_path, "train", files | {"a/3.jpg": b"damaged"})
    write_folder(tmp_path, "val", {f"b/{i}.png": encode(smooth(40, 50)) for i in range(2)})
    config = small_config()
    config.dataset = {"name": "image_folder", "data_dir": str(tmp_path), "test_split": "val"}
    config.transform.image_size = 32
    config.augment.flip = True
    config.batch_size = 16
    config.eval_batch_size = 16
    with pytest.raises(ValueError, match=r"^cannot read the image .*/train/a/3\.jpg: "):
        train(config, tmp_path / "raises")
    config.loader.on_error = "skip"
    result = train(config, tmp_path / "skips")
    assert result["examples"] == 2
    printed = capsys.readouterr().out
    assert "left out, since they cannot be decoded: " in printed
    assert "16 training images streamed from the host, 2 test images, 2 classes" in printed
