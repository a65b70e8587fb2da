"""Whole runs on the digits, with a narrow model and two epochs of 22 or 23 steps."""

import contextlib
import itertools
import json
import os
import shutil
import sys
import threading
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from image_files import encode, smooth, write_folder
from randomize import randomized

from slimconv_jax.data.datasets import load_source
from slimconv_jax.errors import InputWarning
from slimconv_jax.inference.evaluate import evaluate
from slimconv_jax.inference.saved import open_model
from slimconv_jax.models import zoo
from slimconv_jax.models.complexity import count_params
from slimconv_jax.models.variables import by_name
from slimconv_jax.models.zoo import abstract_model, create_model
from slimconv_jax.storage.model_directory import load_model, read_info, save_model
from slimconv_jax.training import loop
from slimconv_jax.training.config import complete, read_config
from slimconv_jax.training.loop import train
from slimconv_jax.training.setup import create_initial


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A network that compiles in half the time of the smallest bottlenecks."""
    with pytest.MonkeyPatch.context() as patch:
        row = zoo.ResNetConfig((1, 1, 1, 1), block="basic")
        patch.setitem(zoo.ARCHITECTURES, "tiny", row)
        yield


def small_config():
    config = read_config("digits")
    config.model.update(name="tiny", k=None, width=8)
    config.optimizer.warmup_epochs = 0.5
    config.num_epochs = 2
    config.eval_every_epochs = 1
    config.log_every_steps = 10
    config.step.ema_decay = 0.9
    return config


def saved_state(workdir, step):
    """All that a checkpoint has, by name."""
    state = {}
    for item in ("model", "optimizer", "ema"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(workdir / "checkpoints" / str(step) / item)
        for path, leaf in jax.tree.leaves_with_path(tree):
            state[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return state


def assert_same_state(a, b):
    assert a.keys() == b.keys() and len(a) > 100
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


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


DAMAGE = {
    # As after a kill between the two checkpoints: metrics went on, the checkpoint did not.
    "killed": lambda newest: shutil.rmtree(newest),
    "truncated": lambda newest: os.truncate(max(newest.rglob("d/*"), key=os.path.getsize), 100),
}


def test_a_run_leaves_its_config_metrics_and_checkpoints(run):
    workdir, result = run
    assert {path.name for path in workdir.iterdir()} == {
        ".lock",
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


@pytest.mark.slow  # what test_hosts.py shows in float64, in whole runs
def test_one_device_and_eight_give_the_same_losses(tmp_path):
    # In float32 a sum in another order lets a ReLU here and there take the other side, and
    # with small feature maps each such turn changes the gradient by up to 1 %. With large maps
    # and a low rate it stays small; see test_hosts.py for float64.
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


@pytest.mark.parametrize("damage", ["killed", pytest.param("truncated", marks=pytest.mark.long)])
def test_an_interrupted_run_continues_to_the_same_result(run, tmp_path, capsys, damage):
    workdir, result = run
    copy = shutil.copytree(workdir, tmp_path / "copy")
    DAMAGE[damage](copy / "checkpoints" / "45")
    assert train(small_config(), copy) == result
    printed = capsys.readouterr().out
    assert f"continuing {copy} after step 22" in printed
    assert ("warning: " in printed) == (damage == "truncated")
    for split in ("train", "test", "test_ema"):
        assert metrics(copy, split) == metrics(workdir, split)
    assert_same_state(saved_state(copy, 45), saved_state(workdir, 45))


@pytest.mark.long
def test_a_run_whose_images_grow_continues_to_the_same_result(tmp_path, capsys):
    config = small_config()
    options = {"num_examples": 96, "num_classes": 5, "image_size": 56}
    config.dataset = {"name": "synthetic", "train_split": "train", "test_split": "test", **options}
    config.transform.update(image_size=48, progressive_sizes=(32,))
    config.update(batch_size=16, checkpoint_every_steps=3, checkpoints_to_keep=9)
    config.optimizer.base_batch_size = 16
    result = train(complete(config), tmp_path / "run")
    printed = capsys.readouterr().out
    assert "3 of 32 images at 32 pixels, then 6 of 16 images at 48 pixels, 2 epochs" in printed
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run", "train")]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 1.5 * rates[1]  # batches twice as large until then
    for step in (3, 6):  # the end of the smaller images, and within the larger ones
        copy = shutil.copytree(tmp_path / "run", tmp_path / str(step))
        for path in (copy / "checkpoints").iterdir():
            if int(path.name) > step:
                shutil.rmtree(path)
        assert train(complete(config), copy) == result
        assert metrics(copy, "train") == metrics(tmp_path / "run", "train")
        assert_same_state(saved_state(copy, 9), saved_state(tmp_path / "run", 9))


def test_a_complete_run_says_so_and_changes_nothing(run, capsys):
    workdir, result = run
    before = (workdir / "metrics.jsonl").stat().st_mtime_ns
    again = train(small_config(), workdir)
    assert {key: again[key] for key in result} == result
    assert "is complete, nothing to do: top-1" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("step", [pytest.param(22, marks=pytest.mark.long), 45])
def test_an_evaluation_that_an_interruption_took_is_made_up_for(run, tmp_path, step):
    # As after a kill between a checkpoint and the end of its evaluation.
    workdir, result = run
    copy = shutil.copytree(workdir, tmp_path / "copy")
    if step == 22:
        shutil.rmtree(copy / "checkpoints" / "45")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if f'"step": {step}, "split": "test' not in line]
    assert len(kept) == len(lines) - 2
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
        ("model", "dtype", "bfloat17", "dtype='bfloat17' is not a dtype"),
        ("model", "dilation", True, "must be 3 booleans"),
        ("augment", "crop_padding", -1, "crop_padding=-1"),
        ("normalize", "std", (1, 1, 0), "must be three numbers each"),
        ("optimizer", "learning_rate", -1.0, "learning_rate=-1.0"),
        ("optimizer", "name", "adamw", "adamw has no momentum"),
        ("step", "ema_decay", 1.5, "ema_decay=1.5 must be a number >= 0 and < 1"),
    ],
)
def test_a_bad_config_does_not_claim_the_work_directory(tmp_path, section, key, value, message):
    config = small_config()
    config.model.update(name="sc_resnet14", k="4/3")
    with config.ignore_type():
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
            "crop_ratio": 0.875,
            "mean": [0.306, 0.306, 0.306],
            "std": [0.324, 0.324, 0.324],
        },
        "image_shape": [32, 32, 3],
    }
    model = load_model(workdir)
    assert model.config.width == 8 and model.stem.bn.use_running_average
    for batch_size in (64, 1000):
        again = evaluate(workdir, load_source("digits", "test"), batch_size=batch_size)
        assert {key: again[key] for key in ("correct", "correct_top5", "examples")} == {
            key: result[key] for key in ("correct", "correct_top5", "examples")
        }
        assert again["loss"] == pytest.approx(result["loss"], rel=1e-6)


def test_other_classes_than_before_are_refused(run, tmp_path):
    workdir, _ = run
    copy = shutil.copytree(workdir, tmp_path / "copy")
    description = json.loads((copy / "model.json").read_text())
    description["info"]["class_names"][3] = "drei"
    (copy / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"the classes of the data are not those that .*/copy was"):
        train(small_config(), copy)


def test_another_architecture_under_the_same_name_is_refused(run, tmp_path):
    # As of a file of channels that has changed since the run began.
    workdir, _ = run
    copy = shutil.copytree(workdir, tmp_path / "copy")
    description = json.loads((copy / "model.json").read_text())
    description["architecture"]["width"] = 16
    (copy / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="of another architecture, with other width; choose"):
        train(small_config(), copy)


@pytest.mark.long
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


def classifier_of(model):
    return {name: np.asarray(getattr(model.classifier, name)[...]) for name in ("kernel", "bias")}


@pytest.mark.long
def test_a_run_starts_from_a_saved_model_with_a_new_classifier(tmp_path, capsys):
    saved = randomized(lambda: abstract_model("tiny", width=8, num_classes=4))
    save_model(saved, tmp_path / "saved")
    config = small_config()
    config.init_from = str(tmp_path / "saved")
    config.num_epochs = 1
    config.optimizer.learning_rate = 0.0  # so that what it starts from is what it ends with
    config.step = {"batch_norm": "frozen"}
    config.profile_steps = 2
    train(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert f"profile of steps 6 to 7: {tmp_path / 'run' / 'profile'}\n" in printed
    assert any((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match="has no moving average"):
        load_model(tmp_path / "run", ema=True)
    words = "but a new classifier of 10 classes instead of its 4"
    assert f"start    from the weights of {tmp_path / 'saved'}, {words}" in printed
    trained = load_model(tmp_path / "run")
    scratch = create_model("tiny", width=8, num_classes=10, rngs=nnx.Rngs(params_key(0)))
    for name, value in classifier_of(scratch).items():
        np.testing.assert_array_equal(classifier_of(trained)[name], value)
    trained.classifier = saved.classifier
    for kind in (nnx.Param, nnx.BatchStat):
        states = [nnx.to_pure_dict(nnx.state(model, kind)) for model in (trained, saved)]
        jax.tree.map(np.testing.assert_array_equal, *states)

    # A run is a saved model as well, and with the same classes its classifier is kept.
    config.init_from = str(tmp_path / "run")
    config.optimizer.freeze = ("stem.*",)
    train(config, tmp_path / "next")
    printed = capsys.readouterr().out
    all_params, of_stem = count_params(scratch), count_params(scratch.stem)
    assert f"{all_params:,} parameters ({all_params - of_stem:,} of them trained), " in printed
    assert "a new classifier" not in printed
    for name, value in classifier_of(scratch).items():
        np.testing.assert_array_equal(classifier_of(load_model(tmp_path / "next"))[name], value)

    complete_config = complete(config)
    complete_config.normalize.std = (0.3, 0.3, 0.4)
    with pytest.warns(InputWarning, match=r"normalize.std is \(0.3, 0.3, 0.4\), and the"):
        create_initial(complete_config, 10)


def params_key(seed):
    return jax.random.split(jax.random.key(seed))[0]


def test_another_architecture_to_start_from_is_refused_and_claims_nothing(tmp_path):
    save_model(randomized(lambda: abstract_model("sc_resnet14", k=2, width=8)), tmp_path / "saved")
    config = small_config()
    config.model.update(name="sc_resnet14", k="4/3")
    for path, message in (
        (
            tmp_path / "saved",
            r"is sc_resnet14, k=2, 1000 classes, width 8, and config.model is .*k=4/3",
        ),
        (tmp_path / "none", "there is no directory"),
    ):
        config.init_from = str(path)
        with pytest.raises(ValueError, match=message):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_run_that_diverges_keeps_its_checkpoints(tmp_path):
    config = small_config()
    config.model.width = 4
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.update(schedule="multistep", milestones=(1.2,) * 6, decay_factor=1e5)
    with pytest.raises(ValueError, match=r"is (nan|inf) at step 2\d: the training diverged"):
        train(config, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["22"]
    assert load_model(tmp_path, ema=True).config.width == 4


@pytest.mark.long
def test_checkpoints_between_evaluations(tmp_path, monkeypatch):
    """Every nine steps, or every minute, which is looked at where lines are written."""
    config = small_config()
    config.update(num_epochs=1, checkpoint_every_steps=9, checkpoints_to_keep=99)
    now = itertools.count(0, 40)
    clock = types.SimpleNamespace(monotonic=lambda: next(now), perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", clock)
    config.update(checkpoint_every_minutes=1.0, log_every_steps=4)
    train(config, tmp_path)
    # 40 s have passed when it looks at step 4, 80 at 8; each checkpoint begins the minute anew.
    expected = [8, 9, 16, 18, 22]
    steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == set(expected)
    lines = [line["step"] for line in metrics(tmp_path, "train")]
    assert lines == sorted({*expected, *range(4, 22, 4)})


def test_averaged_weights_and_older_checkpoints_can_be_loaded(run):
    workdir, result = run
    test = load_source("digits", "test")
    (averaged,) = (line for line in metrics(workdir, "test_ema") if line["step"] == 22)
    again = evaluate(open_model(workdir, checkpoint=22, ema=True), test, batch_size=256)
    assert again["correct"] == averaged["correct"] != result["correct"]
    with pytest.raises(ValueError, match="has no checkpoint of step 30; it has those of 22, 45"):
        load_model(workdir, checkpoint=30)


def test_the_last_checkpoints_can_be_averaged(run, tmp_path):
    workdir, _ = run
    for ema in (False, True):
        one, two, mean = (
            by_name(load_model(workdir, ema=ema, **which))
            for which in ({"checkpoint": 22}, {"checkpoint": 45}, {"average": 2})
        )
        for name, value in mean.items():
            expected = (np.asarray(one[name][...], float) + np.asarray(two[name][...])) / 2
            np.testing.assert_allclose(value[...], expected, rtol=1e-6, atol=1e-7, err_msg=name)
    with pytest.raises(ValueError, match=r"no 2 checkpoints up to step 22 to average; .* 22, 45"):
        load_model(workdir, checkpoint=22, average=2)
    with pytest.raises(ValueError, match="average=0 must be an integer >= 1"):
        load_model(workdir, average=0)
    save_model(load_model(workdir, average=2), tmp_path / "saved")
    with pytest.raises(ValueError, match="is not a training run, so it has one set of weights"):
        load_model(tmp_path / "saved", average=2)


@pytest.mark.slow
def test_no_order_of_kills_loses_a_line(run, tmp_path, monkeypatch):
    # What a SIGKILL would leave before each change of a file from the last epoch on.
    workdir, result = run
    snapshots, seen = [], set()
    inside, one_at_a_time = threading.local(), threading.Lock()
    path = tmp_path / "run"
    watching = True

    def watch(event, arguments):
        changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if not watching or getattr(inside, "copying", False) or not (event in changes or writes):
            return
        if not str(arguments[0]).startswith(str(path)) or len(snapshots) > 60:
            return
        inside.copying = True
        with one_at_a_time:
            take()
        inside.copying = False

    def take():
        copy = tmp_path / f"copy{len(snapshots)}"
        ignore_errors = {"copy_function": copy_if_there, "dirs_exist_ok": True}
        # The checkpoints before the lines, which are written in the other order.
        for name in ("checkpoints", "tensorboard", "metrics.jsonl", "config.json", "model.json"):
            source = path / name
            with contextlib.suppress(FileNotFoundError, shutil.Error):
                if source.is_dir():
                    shutil.copytree(source, copy / name, **ignore_errors)
                elif source.exists():
                    copy.mkdir(exist_ok=True)
                    shutil.copy(source, copy / name)
        files = [*copy.rglob("*")] if copy.exists() else []
        lines = (copy / "metrics.jsonl").read_bytes() if (copy / "metrics.jsonl") in files else b""
        state = (frozenset(str(file.relative_to(copy)) for file in files), lines)
        if b'"step": 30' not in lines or state in seen:
            shutil.rmtree(copy, ignore_errors=True)
            return
        seen.add(state)
        snapshots.append(copy)

    def copy_if_there(source, target):
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(source, target)

    sys.addaudithook(watch)
    try:
        assert train(small_config(), path) == result
    finally:
        watching = False
    assert 5 < len(snapshots) < 60
    for snapshot in snapshots:
        assert train(small_config(), snapshot) == result, snapshot
        for split in ("train", "test", "test_ema"):
            assert metrics(snapshot, split) == metrics(workdir, split), snapshot
        assert_same_state(saved_state(snapshot, 45), saved_state(workdir, 45))
        shutil.rmtree(snapshot)
