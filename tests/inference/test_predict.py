"""`python -m slimconv_jax predict`."""

import json

import numpy as np
import pytest
from classifier import NAMES, build_classifier, save_classifier
from image_files import encode, smooth
from randomize import apply, randomized

from slimconv_jax import devices, save_model
from slimconv_jax.__main__ import main
from slimconv_jax.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Transform
from slimconv_jax.models.zoo import abstract_model


@pytest.fixture(autouse=True)
def no_cache_of_its_own(monkeypatch):
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def model():
    model = build_classifier()
    model.eval()
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save_classifier(model, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eleven photos in two directories, a text among them."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(11):
        path = root / ("a" if index < 4 else "b/c") / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(smooth(20 + index, 30, index)))
    (root / "a" / "notes.txt").write_text("no image")
    return root


def expected(model, files):
    images = np.stack([Transform(16).for_evaluation(file.read_bytes(), "") for file in files])
    normalized = (images / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    logits = np.asarray(apply(model, normalized.astype(np.float32)), np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.argsort(-shares)[:, :5], -np.sort(-shares)[:, :5]


def predict(capsys, *arguments):
    assert main(["predict", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_files_folders_and_patterns(model, saved, photos, capsys):
    files = sorted(photos.glob("**/*.png"))
    classes, shares = expected(model, files)
    # The last pattern matches a directory, files in it, a text, and an empty directory.
    (photos / "a" / "empty").mkdir()
    arguments = [files[0], photos / "b", f"{photos}/a/0[12].*", f"{photos}/a/**"]
    wanted = [0, *range(4, 11), 1, 2, 0, 1, 2, 3]
    with pytest.warns(UserWarning, match=r"^1 file in .*/a/\*\* is left out.*: 1 \.txt$"):
        report = json.loads(predict(capsys, saved, *arguments, "--json", "--batch-size", 8))
    assert [entry["image"] for entry in report] == [str(files[i]) for i in wanted]
    for entry, index in zip(report, wanted, strict=True):
        guesses = entry["predictions"]
        assert [guess["index"] for guess in guesses] == classes[index].tolist()
        assert [guess["name"] for guess in guesses] == [NAMES[c] for c in classes[index]]
        np.testing.assert_allclose(
            [guess["probability"] for guess in guesses], shares[index], rtol=1e-4
        )

    lines = predict(capsys, saved, files[2], photos / "a" / "01.png").splitlines()
    assert lines[0].split() == ["image", "probability", "class"] and len(lines) == 11
    for line, index in ((lines[1], 2), (lines[6], 1)):
        probability = f"{shares[index][0]:.2%}"
        assert line.split() == [str(files[index]), probability, NAMES[classes[index][0]]]
    assert lines[2].split() == [f"{shares[2][1]:.2%}", NAMES[classes[2][1]]]


def test_other_preprocessing_gives_other_probabilities(saved, photos, capsys):
    image = photos / "a" / "00.png"
    more = ([], ["--mean", 0, 0, 0], ["--image-size", 8])
    outputs = {predict(capsys, saved, image, *arguments) for arguments in more}
    assert len(outputs) == 3


def test_images_of_another_size_than_in_training(model, photos, tmp_path, capsys):
    path, image = tmp_path / "model", photos / "a" / "00.png"  # of 30x20 pixels
    info = {"preprocessing": {"image_size": None}, "image_shape": [16, 16, 3]}
    save_model(model, path, info=info)
    assert main(["predict", str(path), str(image)]) == 1
    assert capsys.readouterr().err == (
        "error: the model was trained on images of 16x16 pixels and takes them as they are, and "
        "these have 30x20; --image-size N (image_size) resizes them\n"
    )
    assert len(predict(capsys, path, image, "--image-size", 16).splitlines()) == 6


def test_what_is_no_image(saved, photos, capsys):
    text, image = photos / "a" / "notes.txt", photos / "a" / "00.png"
    assert main(["predict", str(saved), str(image), str(text)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: cannot read the image {text}: it is in none of")
    assert captured.err.count("\n") == 1
    printed = predict(capsys, saved, image, text, "--on-error", "skip")
    assert printed.splitlines()[-1].split(maxsplit=1) == [str(text), "cannot be read"]
    report = json.loads(predict(capsys, saved, text, image, "--on-error", "skip", "--json"))
    assert [len(entry["predictions"]) for entry in report] == [0, 5]


def test_bad_input(model, saved, photos, tmp_path, capsys):
    image = photos / "a" / "00.png"
    (tmp_path / "secret.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "empty").mkdir()
    headless, misnamed = tmp_path / "headless", tmp_path / "misnamed"
    save_model(model, misnamed, info={"class_names": NAMES[:5]})
    save_model(randomized(lambda: abstract_model("resnet14", width=8, num_classes=0)), headless)
    for arguments, message in (
        ([tmp_path / "none", image], f"there is no directory {tmp_path}/none"),
        ([tmp_path / "empty", image], f"{tmp_path}/empty holds no model: there is no model.json"),
        ([saved, tmp_path / "a.png"], f"there is no file or directory '{tmp_path}/a.png'"),
        ([saved, tmp_path / "*.jpg"], f"no image matches '{tmp_path}/*.jpg'"),
        ([saved, tmp_path / "empty"], "there are no images (.apng, "),
        ([saved, tmp_path / "secret.png"], f"cannot read {tmp_path}/secret.png: No such file"),
        ([saved, image, "--batch-size", 0], "batch_size=0 must be an integer >= 1"),
        ([misnamed, image], "model.json is damaged: it names 5 classes, not 7"),
        ([headless, image], f"{headless} has no classifier, so it predicts no classes"),
    ):
        assert main(["predict", *map(str, arguments)]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1
        assert captured.out == ""
