import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_files import encode, write_folder, write_tfds

from slimconv_jax.data.datasets import load_source, load_splits, with_classes
from slimconv_jax.data.sources import ArraySource, ImageFolder

DATA = os.environ.get("SLIMCONV_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SLIMCONV_TEST_DATA is not set")


def pixels_and_labels(source):
    examples = [source[index] for index in range(len(source))]
    return np.stack([e.image for e in examples]), np.array([e.label for e in examples])


def test_digits_are_split_once_and_evenly():
    counts = []
    for split, size in (("train", 1437), ("test", 360)):
        source = load_source("digits", split)
        images, labels = pixels_and_labels(source)
        assert images.shape == (size, 32, 32, 3) and images.dtype == np.uint8
        assert images.max() == 255 and images.min() == 0
        assert source.class_names == tuple("0123456789")
        counts.append(np.bincount(labels, minlength=10))
    # Stratified: each class keeps its share, to within one image.
    np.testing.assert_allclose(counts[1], (counts[0] + counts[1]) * 360 / 1797, atol=1)
    np.testing.assert_array_equal(images, pixels_and_labels(load_source("digits", "test"))[0])


def test_digits_and_their_split_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    theirs = load_digits()
    split = train_test_split(np.arange(1797), test_size=360, stratify=theirs.target, random_state=0)
    for name, indices in zip(("train", "test"), map(np.sort, split), strict=True):
        images, labels = pixels_and_labels(load_source("digits", name))
        np.testing.assert_array_equal(labels, theirs.target[indices])
        # Resizing keeps the mean grey of a picture, nearly.
        expected = theirs.images[indices].mean(axis=(1, 2)) * (255 / 16)
        np.testing.assert_allclose(images[..., 0].mean(axis=(1, 2)), expected, atol=1.5)


PICTURE = encode(np.zeros((2, 3, 3)))


def test_an_image_folder_has_its_classes_by_name_and_its_files_below(tmp_path):
    write_folder(
        tmp_path,
        "val",
        {"b/1.png": PICTURE, "b/deep/0.JPEG": b"jpeg", "a/x.webp": b"webp", "c/z.bmp": b"bmp"}
        | {"b/notes.txt": b"", "b/.hidden.png": b"", ".cache/1.png": b""},
    )
    with pytest.warns(UserWarning, match=r"^1 file in .*/val is left out.*: 1 \.txt$"):
        source = load_source("image_folder", "val", data_dir=str(tmp_path))
    assert source.class_names == ("a", "b", "c")
    files = [source.describe(index) for index in range(len(source))]
    names = ["a/x.webp", "b/1.png", "b/deep/0.JPEG", "c/z.bmp"]
    assert files == [str(tmp_path / "val" / name) for name in names]
    assert [source[index] for index in range(4)] == [
        (b"webp", 0),
        (PICTURE, 1),
        (b"jpeg", 1),
        (b"bmp", 2),
    ]


def test_a_file_that_vanished_is_a_sentence(tmp_path):
    write_folder(tmp_path, "val", {"a/1.png": PICTURE})
    source = ImageFolder(tmp_path, "val")
    (tmp_path / "val" / "a" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"^cannot read .*a/1\.png: No such file"):
        source[0]


def test_a_prepared_tfds_data_set(tmp_path):
    pictures = [encode(np.full((2, 3 + label, 3), label)) for label in range(3)]
    splits = {"train": [(pictures[i % 3], i % 3) for i in range(7)], "test": [(pictures[2], "owl")]}
    write_tfds(tmp_path, splits)
    train, test = load_splits(name="tfds/animals", data_dir=tmp_path)
    assert (len(train), len(test)) == (7, 1)
    assert train.class_names == test.class_names == ("cat", "dog", "owl")
    assert [train[i] for i in range(7)] == splits["train"]  # still encoded
    assert test[0] == (pictures[2], 2)
    assert test.describe(0) == "record 0 of tfds/animals, split 'test'"
    assert len(load_source("tfds/animals:1.0.0", "train[:3]", data_dir=tmp_path)) == 3
    assert len(load_source("tfds/animals", "train+test", data_dir=tmp_path)) == 8
    for split in ("train[:0]", "train[:abc]"):
        with pytest.raises(ValueError, match=r"^cannot read 'train\[:.*\]' of .*/1\.0\.0: .*$"):
            load_source("tfds/animals", split, data_dir=tmp_path)


def test_synthetic_images_are_the_same_each_time():
    source = load_source("synthetic", "train", num_examples=5, num_classes=2, image_size=8)
    assert len(source) == 5 and source.class_names == ("0", "1")
    images, labels = pixels_and_labels(source)
    assert images.shape == (5, 8, 8, 3) and labels.tolist() == [0, 1, 0, 1, 0]
    np.testing.assert_array_equal(source[3].image, images[3])
    assert len({image.tobytes() for image in images}) == 5


def test_classes_are_matched_by_name(tmp_path):
    write_folder(tmp_path, "train", {f"{name}/1.png": PICTURE for name in "abcd"})
    write_folder(tmp_path, "test", {f"{name}/1.png": PICTURE for name in "bd"})
    _, test = load_splits(name="image_folder", data_dir=tmp_path)
    assert test.class_names == ("a", "b", "c", "d")
    assert [test[index].label for index in range(2)] == [1, 3]
    assert test.describe(1) == str(tmp_path / "test" / "d" / "1.png")
    source = ImageFolder(tmp_path, "train")
    assert with_classes(source, "abcd", of="the model") is source
    with pytest.raises(ValueError, match="2 of the 4 classes of the data, such as 'b', are not am"):
        with_classes(source, ("a", "c", "e"), of="the model")


def test_a_path_must_be_one():
    with pytest.raises(ValueError, match=r"^data_dir must be a path, not 3$"):
        load_source("image_folder", "train", data_dir=3)


def image_folder(tmp_path):
    write_folder(tmp_path, "train", {"a/1.png": PICTURE, "b/note.txt": b""})
    (tmp_path / "flat").mkdir()


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("mnist", "train", "^unknown data set 'mnist'; there are: digits, tfds/NAME, image_folder"),
        ("digits", "validation", "^digits has no split 'validation'; there are: train, test$"),
        (3, "train", "^the name of a data set must be a string, not 3$"),
        ("digits", None, "^the name of a split must be a string, not None$"),
        ("image_folder", "train", "^the data set image_folder needs a data_dir"),
        ("synthetic -1", "train", "^synthetic: image_size=-1 must be an integer >= 1$"),
        ("digits DIR", "test", "^the data set digits takes no data_dir, but was given "),
        ("image_folder DIR/none", "train", "^there is no directory .*none$"),
        ("image_folder DIR", "val", "^there is no directory .*/val; .* has: flat, train$"),
        ("image_folder DIR", "flat", "flat has no directories, one for each class"),
        ("image_folder DIR", "train", r"^the class .*/b has no images \(\.\w+, "),
        ("tfds/cifar10 DIR/none", "train", "^there is no directory .*none$"),
        (
            "tfds/nosuch DIR",
            "train",
            "^TFDS has no data set 'nosuch' in .*: Dataset nosuch not fou",
        ),
        ("tfds/no such DIR", "train", "^TFDS has no data set 'no such': the name must"),
        (
            "tfds/cifar10 DIR",
            "train",
            "^the data set tfds/cifar10 is not prepared in (.*); to prepare it, in any environ"
            r"ment: pip install .* && tfds build cifar10 --file_format=array_record --data_dir=\1$",
        ),
    ],
)
def test_unusable_data_sets(name, split, message, tmp_path):
    image_folder(tmp_path)
    options = {}
    if isinstance(name, str):
        name, *rest = name.replace("no such", "no\0such").split(" ")
        name = name.replace("\0", " ")
        if rest == ["-1"]:
            options = {"image_size": -1}
        elif rest:
            options = {"data_dir": rest[0].replace("DIR", str(tmp_path))}
    with pytest.raises(ValueError, match=message) as error:
        load_source(name, split, **options)
    assert "\n" not in str(error.value)


def test_unusable_tfds_data_sets(tmp_path):
    write_tfds(tmp_path, {"test": [(PICTURE, -1), (PICTURE, 1)]})
    source = load_source("tfds/animals", "test", data_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"^record 0 of .* has the label -1; labels must be 0 to 2"
    ):
        source[0]
    with pytest.raises(ValueError, match=r"^tfds/animals has no split 'train'; there are: test$"):
        load_source("tfds/animals", "train", data_dir=tmp_path)

    directory = tmp_path / "animals" / "1.0.0"
    info = json.loads((directory / "dataset_info.json").read_text())
    (directory / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(
        ValueError,
        match=f"^the data set in {directory} is in the format tfrecord, which has no random access"
        "; to convert it, in any environment: pip install .* && tfds convert_format "
        f"--dataset_version_dir={directory} --out_file_format=array_record$",
    ):
        load_source("tfds/animals", "test", data_dir=tmp_path)


def test_a_tfds_data_set_without_images(tmp_path):
    def features(tfds):
        return {"image": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}

    write_tfds(tmp_path, {"train": [{"image": "a cat", "label": 0}]}, features=features)
    message = (
        r"not an image classification data set: its features are image \(Text\), label \(ClassL"
    )
    with pytest.raises(ValueError, match=message):
        load_source("tfds/animals", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tensorflow_datasets.core.features.text_feature.Text", "strangers_module.Feature"),
        ("tensorflow_datasets.core.features.image_feature.Image", "strangers_module.Image"),
    ],
)
def test_a_strangers_data_set_imports_no_module(old, new, tmp_path, monkeypatch):
    def features(tfds):
        return {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=["cat"]),
            "note": tfds.features.Sequence({"text": tfds.features.Text()}),
        }

    record = {"image": PICTURE, "label": 0, "note": {"text": ["a"]}}
    write_tfds(tmp_path, {"train": [record]}, features=features)
    assert load_source("tfds/animals", "train", data_dir=tmp_path)[0] == (PICTURE, 0)
    file = tmp_path / "animals" / "1.0.0" / "features.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    (tmp_path / "strangers_module.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(tmp_path)
    message = f"its features.json names the class '{new}', whose module is not imported"
    with pytest.raises(ValueError, match=message) as error:
        load_source("tfds/animals", "train", data_dir=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["kaggle:animals", "animals/a=1", "animals/x/a=1", "../animals"])
def test_tfds_names_that_could_run_code(name, tmp_path):
    with pytest.raises(ValueError, match=f"^TFDS has no data set '{name}': the name must be NAME"):
        load_source(f"tfds/{name}", "train", data_dir=tmp_path)


def test_a_damaged_tfds_record_is_a_sentence(tmp_path):
    write_tfds(tmp_path, {"test": [(PICTURE, 1)] * 3})
    (file,) = (tmp_path / "animals" / "1.0.0").glob("*.array_record-*")
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(ValueError, match=r"^cannot read (record|.*1\.0\.0)"):
        load_source("tfds/animals", "test", data_dir=tmp_path)[0]


@needs_data
def test_cifar100():
    train, test = load_splits(name="tfds/cifar100", data_dir=DATA)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert len(train.class_names) == 100 and train.class_names[:2] == ("apple", "aquarium_fish")
    assert train[49_999].image[:4] == b"\x89PNG"
    assert np.bincount([test[index].label for index in range(10_000)]).tolist() == [100] * 100


@needs_data
def test_imagenet_photos():
    source = load_source("image_folder", "val", data_dir=Path(DATA) / "imagenet_sample")
    assert len(source) == len(source.class_names) == 100
    assert source.class_names[0] == "n01440764"


def test_array_sources_describe_their_images():
    source = ArraySource(np.zeros((2, 1, 1, 3), np.uint8), np.array([0, 1]), ("a", "b"), "shapes")
    assert source.describe(1) == "image 1 of shapes" and source[1].label == 1


@pytest.mark.process
def test_reading_tfds_imports_no_tensorflow(tmp_path):
    write_tfds(tmp_path, {"train": [(PICTURE, 1)]})
    code = (
        "import sys; from slimconv_jax.data.datasets import load_source\n"
        f"source = load_source('tfds/animals', 'train', data_dir={str(tmp_path)!r}); source[0]\n"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
