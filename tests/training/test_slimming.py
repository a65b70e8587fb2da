"""A trained network is slimmed: its new layers imitate the old ones, then it learns from it."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from randomize import randomized

from slimconv_jax.__main__ import main
from slimconv_jax.devices import data_mesh
from slimconv_jax.models.slimify import slimify
from slimconv_jax.models.variables import by_name
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.storage.model_directory import load_model, save_model
from slimconv_jax.training.config import read_config
from slimconv_jax.training.loop import train
from slimconv_jax.training.setup import create_parts
from slimconv_jax.training.slimming import imitate, slim

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
    options = {"k": "8/3", "imitation_steps": 60, "num_epochs": 2}
    before, imitated, distilled = stages = slim(trained, workdir, **options)
    printed = capsys.readouterr().out
    assert "from the weights of " in printed and "imitation: " in printed
    assert before["parameters"] > imitated["parameters"] == distilled["parameters"]
    assert before["multiply_adds"] > imitated["multiply_adds"]
    assert distilled["top1"] > 0.7 * before["top1"] and imitated["top1"] > 0.15
    assert before["model"] == "resnet14, 10 classes, width 8"
    assert imitated["model"] == "sc_resnet14, k=8/3, 10 classes, width 8"
    assert json.loads((workdir / "slim.json").read_text()) == stages
    model = load_model(workdir)
    assert model.config.reduction == 4
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all("distillation_loss" in line for line in lines if line["split"] == "train")
    assert lines[-1]["top1"] == distilled["top1"]

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
    with pytest.raises(ValueError, match=r"holds another experiment: config\.model\.k is '8/3'"):
        slim(trained, workdir, **options | {"k": "4/3"})


def test_what_cannot_be_slimmed(tmp_path, capsys):
    save_model(network("resnet18"), tmp_path / "basic")
    save_model(network("sc_resnet14"), tmp_path / "slim")
    save_model(network(), tmp_path / "plain")
    out = str(tmp_path / "out")
    for name, arguments, message in [
        ("nothing", [], "there is no directory"),
        ("basic", [], "slim takes a network of plain bottlenecks, such as resnet50, not resnet18"),
        ("slim", [], "slim takes a network of plain bottlenecks, .*, not sc_resnet14"),
        ("plain", ["--k", "7"], "k='7' is not a compression ratio"),
        ("plain", ["--num-epochs", "0"], "num_epochs=0 must be an integer"),
        ("plain", ["--config", "nothing"], "the config .*nothing is not there"),
        ("plain", ["--config", "digits"], "the teacher .* has 3 classes, and the data have 10"),
        ("plain", ["--config.modl.name=x"], "config has no key 'modl'"),
    ]:
        assert main(["slim", str(tmp_path / name), out, *arguments]) == 1
        assert re.match(f"error: .*{message}", capsys.readouterr().err)
        assert not (tmp_path / "out").exists()


def test_the_data_of_a_strangers_run_are_asked_for(tmp_path):
    save_model(network(), tmp_path / "model")
    config = {"dataset": {"name": "image_folder", "data_dir": "/etc"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="to read them from there, add --data-dir /etc"):
        slim(tmp_path / "model", tmp_path / "out")
