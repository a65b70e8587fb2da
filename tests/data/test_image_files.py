"""Which files are images, and that all of them are read."""

import os
import re
from typing import ClassVar

import numpy as np
import pytest
from image_files import encode, smooth
from PIL import Image

from slimconv_jax.data.datasets import load_source
from slimconv_jax.data.image_files import find_images, list_images, suffixes
from slimconv_jax.data.sources import ImageFolder
from slimconv_jax.data.transforms import Transform
from slimconv_jax.files import absolute, read_bytes
from slimconv_jax.torch_interop.file_formats import checkpoint_files

PICTURE = encode(np.zeros((4, 4, 3)), "JPEG")


def write(root, names, data=PICTURE):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def names(files):
    return [re.sub(".*/", "", file) for file in files]


def test_images_are_found_and_others_are_counted(tmp_path):
    write(tmp_path, ("below/A.JPEG", "b.png", ".hidden.png", ".thumbs/b.png", "photo"))
    write(tmp_path, ("notes.txt", "below/README", "a.svg", "b.svg"), b"text")
    (tmp_path / "below" / "again").symlink_to("..")
    one = r"1 (\.txt|without an ending)"
    said = rf"^4 files in .* are left out, since their names .*: 2 \.svg, {one}, {one}$"
    with pytest.warns(UserWarning, match=said):
        assert names(find_images(tmp_path)) == ["b.png", "A.JPEG", "photo"]
    others = set()
    list_images(tmp_path, others)
    assert sorted(names(others)) == ["README", "a.svg", "b.svg", "notes.txt"]
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "c").symlink_to(tmp_path / "below")
    assert names(list_images(tmp_path / "link")) == ["A.JPEG", "b.png", "photo"]
    with pytest.raises(ValueError, match="there is no directory"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there are no images \(\.\w+, .*\.png.*\) in"):
        find_images(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("x.jfif", "JPEG"),
        ("x.JPE", "JPEG"),
        ("x.gif", "GIF"),
        ("x.avif", "AVIF"),
        ("x.jp2", "JPEG2000"),
        ("x.tga", "TGA"),
        ("x.pbm", "PPM"),
        ("x.pcx", "PCX"),
        ("x.dib", "DIB"),
        ("x", "WEBP"),
    ],
)
def test_an_image_of_any_ending_is_read(tmp_path, name, format):
    pixels = smooth(48, 48)
    write(tmp_path / "train" / "a", [name], encode(pixels, format))
    source = load_source("image_folder", "train", data_dir=tmp_path)
    assert len(source) == 1
    transform = Transform(48, scale=(1, 1), ratio=(1, 1))
    read = [
        transform.for_training(source[0].image, name, np.random.default_rng(0)),
        Transform().for_evaluation(source[0].image, name),
    ]
    loss = 20 if format in ("GIF", "AVIF", "WEBP", "JPEG") else 3
    for image in read:
        assert image.shape == (48, 48, 3)
        assert np.abs(image.astype(int) - pixels).mean() < loss


def test_what_runs_other_programs_is_not_read(tmp_path):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
    assert Image.registered_extensions()[".eps"] == "EPS" and ".eps" not in suffixes()
    with pytest.raises(ValueError, match=r"a.eps: it is in none of the formats AVIF, BMP, .*WEBP$"):
        Transform().for_evaluation(postscript, "a.eps")


def test_a_folder_tells_once_what_it_leaves_out(tmp_path):
    write(tmp_path / "train", [f"{c}/{i}.png" for c in "ab" for i in range(2)])
    write(tmp_path / "train", ["a/Thumbs.db", "b/c.psd"], b"")
    with pytest.warns(UserWarning, match=r"^2 files in .*/train are left out, .*1 \.") as caught:
        assert len(ImageFolder(tmp_path, "train")) == 4
    assert len(caught) == 1


class Bucket:
    """An object store that etils reads, with files in memory."""

    files: ClassVar = {f"gs://bucket/data/train/{c}/{i}.png": PICTURE for c in "ab" for i in "01"}

    def is_dir(self, path):
        return any(name.startswith(f"{path}/") for name in self.files)

    def listdir(self, path):
        return sorted({f[len(path) + 1 :].split("/")[0] for f in self.files if f.startswith(path)})


def test_a_folder_in_an_object_store(monkeypatch):
    gpath = pytest.importorskip("etils.epath.gpath")
    bucket = Bucket()
    store = gpath.PosixGPath
    real = {name: getattr(store, name) for name in ("is_dir", "iterdir", "read_bytes")}

    def of(path):
        return str(path) if "://" in str(path) else None

    monkeypatch.setattr(store, "exists", lambda p: True)
    monkeypatch.setattr(
        store, "is_dir", lambda p: bucket.is_dir(of(p)) if of(p) else real["is_dir"](p)
    )
    monkeypatch.setattr(
        store,
        "iterdir",
        lambda p: (p / name for name in bucket.listdir(of(p))) if of(p) else real["iterdir"](p),
    )
    monkeypatch.setattr(
        store, "read_bytes", lambda p: bucket.files[of(p)] if of(p) else real["read_bytes"](p)
    )
    source = load_source("image_folder", "train", data_dir="gs://bucket/data")
    assert source.class_names == ("a", "b") and len(source) == 4
    assert source.describe(3) == "gs://bucket/data/train/b/1.png" and source[3] == (PICTURE, 1)
    assert read_bytes("gs://bucket/data/train/a/0.png") == PICTURE
    with pytest.raises(ValueError, match="there is no directory gs://bucket/nowhere"):
        load_source("image_folder", "train", data_dir="gs://bucket/nowhere")


def test_the_address_of_an_object_store_comes_to_tfds_as_it_is(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    seen = []

    def builder(name, data_dir, **options):
        seen.append(str(data_dir))
        raise RuntimeError("stop here")

    monkeypatch.setattr(tfds, "builder", builder)
    for name in ("exists", "is_dir"):
        monkeypatch.setattr(f"etils.epath.gpath.PosixGPath.{name}", lambda path: True)
    with pytest.raises(ValueError, match="TFDS has no data set 'cifar100' in gs://bucket/d: stop"):
        load_source("tfds/cifar100", "train", data_dir="gs://bucket/d")
    assert seen == ["gs://bucket/d"]


def test_an_object_store_that_nothing_reads_is_a_sentence(monkeypatch):
    def exists(path):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr("etils.epath.gpath.PosixGPath.exists", exists)
    uses = (
        absolute,
        find_images,
        checkpoint_files,
        lambda path: load_source("tfds/a", "x", data_dir=path),
    )
    for use in uses:
        with pytest.raises(ValueError, match=r"^gs://b/a needs another package \(Please install "):
            use("gs://b/a")


def test_a_pipe_without_an_ending_is_no_image(tmp_path):
    write(tmp_path, ("a.png",))
    os.mkfifo(tmp_path / "pipe")
    assert names(list_images(tmp_path)) == ["a.png"]
