"""`python -m slimconv_jax evaluate`, and what it needs of a saved model."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from classifier import NAMES, build_classifier, save_classifier
from flax import nnx
from image_files import encode, smooth, write_folder
from randomize import apply

from slimconv_jax import devices, load_model, save_model
from slimconv_jax.__main__ import main
from slimconv_jax.data.sources import ImageFolder
from slimconv_jax.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Transform
from slimconv_jax.inference.evaluate import evaluate
from slimconv_jax.storage.model_directory import read_info


@pytest.fixture(autouse=True)
def no_cache_of_its_own(monkeypatch):
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def model():
    return build_classifier()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save_classifier(model, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 photos of three of the classes, and a second split with one that is cut off."""
    root = tmp_path_factory.mktemp("folder")
    files = {
        f"{NAMES[2 * (i % 3)]}/{i:02}.jpg": encode(smooth(30 + i, 40, i), "JPEG") for i in range(23)
    }
    write_folder(root, "val", files)
    write_folder(
        root, "cut", {"bee/1.jpg": files["ant/00.jpg"][:-50], "bee/2.png": encode(smooth(20, 20))}
    )
    return root


def expected_logits(model, folder):
    source, transform = ImageFolder(folder, "val"), Transform(16)
    images = np.stack([transform.for_evaluation(source[i].image, "") for i in range(len(source))])
    inference = nnx.clone(model)
    inference.eval()
    normalized = (images / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    labels = np.array([NAMES.index(source.class_names[source[i].label]) for i in range(23)])
    return np.asarray(apply(inference, normalized.astype(np.float32)), np.float64), labels


def test_a_folder_from_the_command_line(model, saved, folder, tmp_path, capsys):
    arguments = ["--data", "image_folder", "--data-dir", str(folder), "--split", "val"]
    more = ["--batch-size", "7", "--json", str(tmp_path / "figures.json")]
    assert main(["evaluate", str(saved), *arguments, *more]) == 0

    logits, labels = expected_logits(model, folder)
    rank = (logits > logits[np.arange(23), labels][:, None]).sum(-1)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(23), labels]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["correct"] == (rank < 1).sum() and figures["correct_top5"] == (rank < 5).sum()
    assert figures["examples"] == 23 and figures["batch_size"] == 8  # for eight devices
    assert figures["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert figures["skipped"] == [] and figures["images_per_second"] > 0
    assert 0 < figures["latency_seconds"] <= figures["latency_seconds_max"]
    assert figures["data"] == {"name": "image_folder", "split": "val", "data_dir": str(folder)}
    printed, kind = capsys.readouterr().out, jax.devices()[0].device_kind
    assert f"on image_folder, split 'val': 23 images of 3 classes; 8 x {kind}\n" in printed
    assert "shorter side to 18, centre of 16 pixels; mean (0.485, " in printed
    assert f"top-1 {figures['top1']:.2%} ({figures['correct']} of 23 images), top-5 " in printed
    assert "images/s from files to results; on the devices, a batch of 8 takes " in printed


@pytest.mark.parametrize("batch_size", [1, pytest.param(7, marks=pytest.mark.long), 1000])
def test_the_figures_do_not_depend_on_the_batch(saved, folder, batch_size):
    source = ImageFolder(folder, "val")
    one, other = (evaluate(saved, source, batch_size=b) for b in (64, batch_size))
    for key in ("correct", "correct_top5", "examples"):
        assert one[key] == other[key]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_images_that_cannot_be_decoded(saved, folder, capsys):
    arguments = ["evaluate", str(saved), "--data", "image_folder", "--data-dir", str(folder)]
    assert main([*arguments, "--split", "cut"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: cannot read the image {folder}/cut/bee/1.jpg: ")
    assert errors.count("\n") == 1
    assert main([*arguments, "--split", "cut", "--on-error", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "(0 of 1 images)" in printed or "(1 of 1 images)" in printed
    assert f"cannot be decoded: {folder}/cut/bee/1.jpg" in printed


@pytest.mark.long
def test_other_preprocessing_gives_other_figures(saved, folder):
    source = ImageFolder(folder, "val")
    arguments = ["evaluate", str(saved), "--data", "image_folder", "--data-dir", str(folder)]
    figures = []
    for more in ([], ["--mean", "0", "0", "0"], ["--std", "1", "1", "1"], ["--image-size", "24"]):
        path = saved.parent / "figures.json"
        assert main([*arguments, "--split", "val", "--json", str(path), *more]) == 0
        figures.append(json.loads(path.read_text())["loss"])
    assert len(set(figures)) == 4
    assert figures[0] == pytest.approx(evaluate(saved, source)["loss"], rel=1e-6)


def test_names_and_preprocessing_go_along_with_an_export(saved, tmp_path):
    for format in ("safetensors", "orbax"):
        path = tmp_path / format
        assert main(["export", str(saved), str(path), "--format", format]) == 0
        assert read_info(path) == read_info(saved)
        assert load_model(path).config == load_model(saved).config


def copy_with_info(saved, path, info):
    """Copies a model, as `save_model` would have written it with this `info`."""
    shutil.copytree(saved, path)
    description = json.loads((path / "model.json").read_text())
    (path / "model.json").write_text(json.dumps({**description, "info": info}))


def test_bad_input(model, saved, folder, tmp_path, capsys):
    nameless, fewer, damaged = tmp_path / "nameless", tmp_path / "fewer", tmp_path / "damaged"
    save_model(model, nameless)
    copy_with_info(nameless, fewer, {"class_names": NAMES[:5]})
    copy_with_info(nameless, damaged, {"preprocessing": {"size": 3}})
    for number, dataset in enumerate((5, {}, {"name": "digits", "size": 3})):
        run = tmp_path / f"run{number}"
        copy_with_info(nameless, run, {})
        (run / "config.json").write_text(json.dumps({"dataset": dataset}))
    elsewhere = {"name": "image_folder", "data_dir": str(folder), "test_split": "val"}
    (tmp_path / "elsewhere").mkdir()
    copy_with_info(nameless, tmp_path / "elsewhere" / "run", {"class_names": NAMES})
    (tmp_path / "elsewhere" / "run" / "config.json").write_text(json.dumps({"dataset": elsewhere}))
    listed = tmp_path / "listed"
    copy_with_info(nameless, listed, {"class_names": [["a"]]})
    images = ["--data", "image_folder", "--data-dir", str(folder), "--split", "val"]
    for arguments, message in (
        ([tmp_path / "none", *images], f"there is no directory {tmp_path}/none"),
        ([saved], f"{saved} does not say what it was trained on, so --data is needed"),
        ([saved, "--data", "mnist"], "unknown data set 'mnist'; there are: digits, tfds/NAME"),
        ([saved, "--data", "digits"], "10 of the 10 classes of the data, such as '0', are not"),
        (
            [saved, *images[:-1], "test"],
            f"there is no directory {folder}/test; {folder} has: cut, ",
        ),
        ([tmp_path / "run0"], f"{tmp_path}/run0/config.json is damaged: it is not a config"),
        ([tmp_path / "run1"], f"{tmp_path}/run1 does not say what it was trained on"),
        ([tmp_path / "run2"], f"{tmp_path}/run2/config.json is damaged: "),
        (
            [tmp_path / "elsewhere" / "run"],
            f"{tmp_path}/elsewhere/run/config.json says that its data are in {folder}; to read "
            f"them from there, add --data-dir {folder}\n",
        ),
        ([listed, *images], f"{listed}/model.json is damaged: class_names is not a list of names"),
        ([saved, *images, "--image-size", "none"], "the images differ in size, so they need an im"),
        ([saved, *images, "--json", tmp_path], f"cannot write {tmp_path}: it is a directory"),
        ([nameless, *images], "the data have 3 classes and the model 7, without names to match"),
        ([fewer, *images], "model.json is damaged: it names 5 classes, not 7"),
        ([damaged, *images], "model.json is damaged: its preprocessing is not valid"),
        ([saved, *images, "--batch-size", "0"], "batch_size=0 must be an integer >= 1"),
        ([saved, *images, "--image-size", "-1"], "transform: image_size=-1 must be an integer"),
        ([saved, *images, "--std", "1", "0", "1"], "normalize: mean="),
        ([saved, *images, "--dtype", "float31"], "dtype='float31' is not a dtype"),
        ([saved, *images, "--json", tmp_path / "no" / "a"], f"cannot write {tmp_path}/no/a: there"),
    ):
        assert main(["evaluate", *map(str, arguments)]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith(f"error: {message}"), errors
        assert errors.count("\n") == 1, errors
    assert not os.path.exists(tmp_path / "no")
