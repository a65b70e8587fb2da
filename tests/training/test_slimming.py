"""A trained network is slimmed: its new layers imitate the old ones, then it learns from it."""

import functools
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx
from randomize import randomized

from slimconv_jax.__main__ import main
from slimconv_jax.devices import data_mesh
from slimconv_jax.errors import InputError
from slimconv_jax.inference.saved import open_model
from slimconv_jax.models.slimify import slimify
from slimconv_jax.models.variables import by_name
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.storage.model_directory import load_model, save_model
from slimconv_jax.storage.work_directory import hold_workdir
from slimconv_jax.training import slimming
from slimconv_jax.training.config import check_config, read_config
from slimconv_jax.training.loop import train
from slimconv_jax.training.setup import create_parts
from slimconv_jax.training.slimming import _errors, imitate, slim

SYNTHETIC = [
    *("--config.dataset.name=synthetic", "--config.dataset.test_split=test"),
    *("--config.dataset.train_split=train", "--config.dataset.image_size=8"),
    *("--config.dataset.num_examples=64", "--config.dataset.num_classes=3"),
    *("--config.model.width=8", "--config.model.stem=cifar", "--config.batch_size=16"),
]


FOLLOWING = ("conv.kernel", "bn.scale", "bn.bias")


def network(name="resnet14", **options):
    options = {"num_classes": 3, "width": 8, "stem": "cifar"} | options
    return randomized(lambda: abstract_model(name, **options))


@pytest.mark.long
def test_new_layers_imitate_the_old_ones_and_the_rest_stays(capsys):
    teacher = network()
    student, _ = slimify(teacher, k="4/3", image_size=8)
    parts = create_parts(read_config("digits", SYNTHETIC), data_mesh())
    before, left = by_name(student), []
    for steps in (1, 60):
        after = imitate(teacher, student, parts, steps=steps)
        left.append(float(capsys.readouterr().out.rpartition("imitation: ")[2].partition("%")[0]))
    assert left[1] < 0.35 * left[0]  # of the variance of the old outputs
    changed = set()
    for name, variable in by_name(after).items():
        if not np.array_equal(variable[...], before[name][...]):
            changed.add(name)
    stages = [f"stages.{number}.0." for number in range(4)]
    imitating = [name for name in before if any(name.startswith(f"{s}conv2.") for s in stages)]
    following = {f"{s}conv3.{leaf}" for s in stages for leaf in FOLLOWING}
    assert changed == {*imitating, *following}
    assert after.stages[0][0].conv2.upper.bn.use_running_average


@pytest.mark.long
def test_blocks_of_a_stage_see_what_the_blocks_before_give():
    teacher, images = network("resnet26"), jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    teacher.eval()
    student, _ = slimify(teacher, k="4/3", image_size=8)
    student.eval()
    errors = [float(error) for error in _errors(teacher, student, images)]
    x, expected = teacher.stem_output(images), []
    for old_stage, new_stage in zip(teacher.stages, student.stages, strict=True):
        for old, new in zip(old_stage, new_stage, strict=True):
            inner = nnx.relu(old.conv1(x))
            theirs = np.asarray(old.conv3(nnx.relu(old.conv2(inner))), np.float64)
            ours = np.asarray(new.conv3(nnx.relu(new.conv2(inner))), np.float64)
            expected.append(((ours - theirs) ** 2).mean() / theirs.var((0, 1, 2)).mean())
            x = old(x)
    assert len(errors) == 8
    np.testing.assert_allclose(errors, expected, rtol=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run of a plain network on the digits."""
    workdir = tmp_path_factory.mktemp("slim") / "plain"
    arguments = [
        *("--config.model.name=resnet14", "--config.model.k=None", "--config.model.width=8"),
        *("--config.num_epochs=3", "--config.eval_every_epochs=3"),
    ]
    train(read_config("digits", arguments), workdir)
    return workdir


@pytest.mark.long
def test_a_run_is_slimmed_and_continues_where_it_was_stopped(trained, tmp_path, capsys):
    workdir = tmp_path / "slim"
    options = {"k": "4/3", "imitation_steps": 200, "num_epochs": 1}
    options["overrides"] = ("--config.log_every_steps=8",)
    before, imitated, distilled = stages = slim(trained, workdir, **options)
    printed = capsys.readouterr().out
    assert "from the weights of " in printed and "imitation: " in printed
    assert before["parameters"] > imitated["parameters"] == distilled["parameters"]
    assert before["multiply_adds"] > imitated["multiply_adds"]
    without = options | {"imitation_steps": 0}
    _, random, unimitated = slim(trained, tmp_path / "unimitated", **without)
    capsys.readouterr()
    assert imitated["top1"] > 3 * random["top1"]
    assert distilled["top1"] > unimitated["top1"] + 0.05
    assert before["model"] == "resnet14, 10 classes, width 8"
    assert imitated["model"] == "sc_resnet14, k=4/3, 10 classes, width 8"
    assert json.loads((workdir / "slim.json").read_text()) == stages
    model = load_model(workdir)
    assert model.config.reduction == 2
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    distances = [line["distillation_loss"] for line in lines if line["split"] == "train"]
    assert distances[-1] < 0.8 * distances[0]
    assert lines[-1]["top1"] == distilled["top1"]

    again = slim(trained, workdir, **options)  # complete
    assert again == stages and "nothing to do" in capsys.readouterr().out
    shutil.rmtree(workdir / "checkpoints")  # as if stopped before the first one
    (workdir / "slim.json").write_text(json.dumps(stages[:2]))
    again = slim(trained, workdir, **options)
    assert "imitation: " not in capsys.readouterr().out
    assert again[:2] == stages[:2] and again[2]["top1"] == distilled["top1"]
    jax.tree.map(
        np.testing.assert_array_equal,
        {name: variable[...] for name, variable in by_name(model).items()},
        {name: variable[...] for name, variable in by_name(load_model(workdir)).items()},
    )
    with pytest.raises(ValueError, match=r"holds another experiment: config\.model\.k is '4/3'"):
        slim(trained, workdir, **options | {"k": "8/3"})


def test_what_cannot_be_slimmed(saved, tmp_path, capsys):
    for name in ("resnet18", "sc_resnet14"):
        message = f"slim takes a network of plain bottlenecks, such as resnet50, not {name}"
        with pytest.raises(InputError, match=message):
            slimming._slimmed(network(name), "4/3")
    shutil.copytree(saved, tmp_path / "plain")
    out = str(tmp_path / "out")
    for name, arguments, message in [
        ("nothing", [], "there is no directory"),
        ("out", [], "out is the model itself; WORKDIR must be another directory"),
        ("plain", ["--k", "7"], "k='7' is not a compression ratio"),
        ("plain", ["--num-epochs", "0"], "num_epochs=0 must be an integer"),
        ("plain", ["--config", "nothing"], "the config .*nothing is not there"),
        ("plain", ["--config.modl.name=x"], "config has no key 'modl'"),
    ]:
        assert main(["slim", str(tmp_path / name), out, *arguments]) == 1
        assert re.match(f"error: .*{message}", capsys.readouterr().err)
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def slimmed():
    """What becomes of `network()`, which takes most of a second."""
    return functools.cache(lambda k, slimmed=slimming._slimmed: slimmed(network(), k))


@pytest.fixture
def configs(monkeypatch, slimmed):
    """Makes `slim` stop before it loads data or computes; returns the configs that it came to."""
    configs = []

    def parts_of(config, mesh):
        check_config(config, 1)
        configs.append(config)
        model = abstract_model(num_classes=3, **config.model)
        test_data = types.SimpleNamespace(image_shape=(8, 8, 3))
        return types.SimpleNamespace(config=config, model=model, test_data=test_data)

    def stop(*args):
        raise InputError("far enough")

    monkeypatch.setattr(slimming, "create_parts", parts_of)
    monkeypatch.setattr(slimming, "_start", stop)
    monkeypatch.setattr(slimming, "_slimmed", lambda model, k: slimmed(k))
    return configs


RUN = {
    "dataset": {"name": "synthetic", "num_examples": 64, "num_classes": 3, "image_size": 8},
    "model": {"name": "resnet14", "width": 8, "stem": "cifar", "k": None},
    "optimizer": {"name": "sgd", "momentum": 0.9, "freeze": ["stem*"], "learning_rate": 0.5},
    "normalize": {"mean": [0.5] * 3, "std": [0.25] * 3},
    "loggers": ["wandb"],
    "batch_size": 16,
    "num_epochs": 90,
}

DIR = ("--config.dataset.data_dir=/there",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model."""
    path = tmp_path_factory.mktemp("saved") / "model"
    save_model(network(), path)
    return path


@pytest.fixture
def recorded(saved):
    """Writes a model with the config of a run."""

    def write(path, config):
        shutil.copytree(saved, path)
        (path / "config.json").write_text(json.dumps(config))
        return path

    return write


def test_the_config_of_the_run_with_the_recipe_and_overrides(tmp_path, configs, recorded):
    run = recorded(tmp_path / "run", RUN)
    overrides = ("--config.optimizer.weight_decay=0.01", "--config.num_epochs=7")
    overrides += ("--config.model.dtype=bfloat16", "--config.dataset.num_examples=32")
    with pytest.raises(InputError, match="far enough"):
        slim(run, tmp_path / "out", k="8/3", overrides=overrides)
    (config,) = configs
    assert config.model.name == "sc_resnet14" and config.model.k == "8/3"
    assert config.model.width == 8 and config.model.dtype == "bfloat16"
    assert config.optimizer.learning_rate == 0.1 and config.optimizer.weight_decay == 0.01
    assert config.optimizer.freeze == () and config.optimizer.schedule == "cosine"
    assert config.loggers == ("tensorboard",)
    assert config.num_epochs == 7 and config.dataset.num_examples == 32
    assert config.distillation.teacher == str(run) and not config.distillation.ema


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "is damaged: it is not a config"),
        ({"optimizer": 3}, "is damaged: it is not a config .config.optimizer must be a section"),
        ({"optimizer": {"name": []}}, "is damaged: it is not a config"),
        ({"dataset": "x"}, "is damaged: it is not a config"),
        ({"num_epochs": "x"}, "far enough"),  # slim has its own
        ({"batch_size": "x"}, "config.batch_size='x' must be an integer"),
        ({"model": {"width": [3]}}, "far enough"),  # the model is known
    ],
)
def test_the_damaged_config_of_a_run_is_a_sentence(tmp_path, configs, change, message, recorded):
    run = recorded(tmp_path / "run", RUN | change if isinstance(change, dict) else change)
    with pytest.raises(InputError, match=message):
        slim(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": ("--config.init_from=x",)}, "config.init_from is for slim to set"),
        ({"overrides": ("--config.model.k=4",)}, "config.model.k is for slim to set"),
        ({"overrides": ("--config.model.width=4",)}, "the config makes sc_resnet14, .*width 4"),
        ({"overrides": ("--config.distillation.ema=True",)}, "ema is for slim to set"),
    ],
)
def test_what_cannot_be_overridden(tmp_path, configs, options, message, recorded):
    with pytest.raises(InputError, match=message):
        slim(recorded(tmp_path / "run", RUN), tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("options", "name", "data_dir"),
    [
        ({"data": "digits"}, "digits", None),
        ({"data": "synthetic", "overrides": ("--config.dataset.name=digits",)}, "digits", None),
        ({"data_dir": "/here", "data": "image_folder"}, "image_folder", "/here"),
        ({"data_dir": "/here", "overrides": DIR}, "image_folder", "/there"),
        ({"overrides": DIR}, "image_folder", "/there"),
    ],
)
def test_other_data(tmp_path, configs, options, name, data_dir, recorded):
    theirs = {"dataset": {"name": "image_folder", "data_dir": "/etc"}}
    with pytest.raises(InputError, match="far enough"):
        slim(recorded(tmp_path / "run", RUN | theirs), tmp_path / "out", **options)
    assert configs[0].dataset.name == name and configs[0].dataset.data_dir == data_dir


@pytest.mark.parametrize("config", [None, "digits"])
def test_the_model_sees_images_as_ever(tmp_path, configs, config):
    """A run by its own config; any other model, or config, by the preprocessing of the model."""
    preprocessing = {"image_size": 24, "crop_ratio": 0.75}
    preprocessing |= {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    save_model(network(), tmp_path / "run", info={"preprocessing": preprocessing})
    (tmp_path / "run" / "config.json").write_text(json.dumps(RUN))
    overrides = ("--config.dataset.name=synthetic", "--config.dataset.num_classes=3")
    overrides += ("--config.dataset.num_examples=64", "--config.dataset.image_size=8")
    overrides += ("--config.dataset.train_split=train", "--config.batch_size=16")
    with pytest.raises(InputError, match="far enough"):
        slim(tmp_path / "run", tmp_path / "out", config=config, overrides=overrides)
    found, is_its_own = configs[0], config is None
    assert found.transform.image_size == (None if is_its_own else 24)
    assert found.transform.crop_ratio == (0.875 if is_its_own else 0.75)
    assert found.normalize.mean == ((0.5,) * 3 if is_its_own else (0.1, 0.2, 0.3))
    assert found.normalize.std == ((0.25,) * 3 if is_its_own else (0.5, 0.6, 0.7))


def test_what_the_recipe_takes_back(tmp_path, configs, recorded):
    settings = {
        "step": {"batch_norm": "per_device"},
        "transform": {"progressive_sizes": [4], "image_size": 8},
        "optimizer": {"name": "schedule_free_sgd", "learning_rate": 1.0, "schedule": "constant"},
    }
    with pytest.raises(InputError, match="far enough"):
        slim(recorded(tmp_path / "run", RUN | settings), tmp_path / "out")
    (config,) = configs
    assert config.step.batch_norm == "global" and config.transform.progressive_sizes == ()
    assert config.optimizer.schedule == "constant" and config.optimizer.learning_rate == 0.2


@pytest.mark.parametrize(
    "rate",
    [
        10**400,
        float("nan"),
        *(pytest.param(rate, marks=pytest.mark.long) for rate in (True, "0.1", -1)),
    ],
)
def test_a_rate_that_is_none(tmp_path, configs, rate, recorded):
    run = recorded(tmp_path / "run", RUN | {"optimizer": {"name": "sgd", "learning_rate": rate}})
    with pytest.raises(InputError, match=r"learning_rate=.* must be a number|is damaged"):
        slim(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.optimizer = 3", "config.optimizer must be a section"),
        ("config.optimizer = ConfigDict({'name': 3})", "config.optimizer.name=3 must be one of"),
        pytest.param("config.model = 3", "config.model must be a section", marks=pytest.mark.long),
        pytest.param(
            "config.distillation = 3",
            "config.distillation must be a section",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_config_file_that_is_none(tmp_path, line, message):
    save_model(network(), tmp_path / "model")
    file = tmp_path / "config.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        "    config = ConfigDict()\n"
        f"    {line}\n    return config\n"
    )
    with pytest.raises(InputError, match=message):
        slim(tmp_path / "model", tmp_path / "out", config=str(file), data="synthetic")


@pytest.mark.long
def test_models_compute_in_the_dtype_of_the_run_and_errors_in_float32():
    teacher = network()
    images = 300 * jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    slimmed = slimify(teacher, k="4/3", image_size=8)[0]
    pair = [slimming._in_dtype(model, "float16") for model in (teacher, slimmed)]
    blocks = [model.stages[0][0].conv1(model.stem_output(images)) for model in pair]
    assert {x.dtype for x in blocks} == {np.dtype("float16")}
    error = next(_errors(*pair, images))
    assert error.dtype == np.float32 and np.isfinite(error)
    with pytest.raises(InputError, match="slim: the test loss before is nan"):
        slimming._stage("before", teacher, (8, 8, 3), {"loss": float("nan")}, 0.0)


def test_another_imitation_and_a_damaged_report_are_refused(tmp_path, configs, recorded):
    run, workdir = recorded(tmp_path / "run", RUN), tmp_path / "out"
    with pytest.raises(InputError, match="far enough"):
        slim(run, workdir)
    stage = {"stage": "x", "top1": 0.5, "top5": 1.0, "parameters": 5, "multiply_adds": 6}
    stage["seconds"] = 7.0
    stages = [stage, stage | {"imitation_steps": 300}, stage]
    report = workdir / "slim.json"
    report.write_text(json.dumps(stages))
    assert slim(run, workdir) == stages  # complete
    with pytest.raises(ValueError, match="imitation_steps is 300 there and 9 here"):
        slim(run, workdir, imitation_steps=9)
    wrong = [[stage, stage], [stage, {}], [3, 4], {}, [], None, [stage, "seconds"]]
    for change in ({"top1": "x"}, {"top1": None}, {"seconds": []}, {"stage": {}}):
        wrong.append([stage | change, stages[1]])
    for damaged in ["", *map(json.dumps, wrong)]:
        report.write_text(damaged)
        with pytest.raises(InputError, match=f"{report}.* is damaged"):
            slimming._read_report(epath.Path(report))
    with (
        hold_workdir(epath.Path(workdir)),
        pytest.raises(ValueError, match="is in use by process"),
    ):
        slim(run, workdir)


def test_the_weights_that_are_slimmed_are_the_teacher(tmp_path, configs, monkeypatch, recorded):
    run, asked = recorded(tmp_path / "run", RUN), []

    def open_saved(path, *, dtype=None, **weights):
        asked.append(weights)
        return open_model(path, dtype=dtype)

    monkeypatch.setattr(slimming, "open_model", open_saved)
    arguments = ["--checkpoint", "40", "--ema", "--average", "2"]
    assert main(["slim", str(run), str(tmp_path / "out"), *arguments]) == 1
    assert asked == [{"checkpoint": 40, "ema": True, "average": 2}]
    teacher = configs[0].distillation
    assert {name: teacher[name] for name in asked[0]} == asked[0] and teacher.teacher == str(run)


def test_the_data_of_a_strangers_run_are_asked_for(tmp_path):
    save_model(network(), tmp_path / "model")
    config = {"dataset": {"name": "image_folder", "data_dir": "/etc"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="to read them from there, add --data-dir /etc"):
        slim(tmp_path / "model", tmp_path / "out")
