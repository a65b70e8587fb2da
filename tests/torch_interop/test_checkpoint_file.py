import argparse
import io
import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from flax import serialization

from slimconv_jax.torch_interop.checkpoint_file import read_checkpoint, write_checkpoint

TENSORS = OrderedDict(
    {
        "module.conv1.weight": torch.arange(6.0).reshape(2, 3),
        "module.bn1.bias": torch.ones(2, dtype=torch.float16),
    }
)
FORMATS = {"legacy": False, "zip": True}


def save(content, path, *, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


def check(found):
    assert list(found) == list(TENSORS)
    for name, tensor in found.items():
        tensor = tensor if isinstance(tensor, torch.Tensor) else torch.from_numpy(np.array(tensor))
        assert torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype


@pytest.mark.parametrize("zipped", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "best",
    [
        torch.tensor(77.23),
        np.float64(77.23),
        np.float32(77.23),
        np.int64(77),
        np.bool_(True),
        np.array([76.0, 77.23]),
    ],
    ids=lambda value: type(value).__name__ + str(value.dtype),
)
def test_a_training_script_saved_more_than_weights(tmp_path, monkeypatch, zipped, best):
    # As from a GPU, which is not needed for that: a storage is only marked with where it was.
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    content = {
        "epoch": 90,
        "arch": "resnet50",
        "state_dict": TENSORS,
        "best_prec1": best,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []},
        "args": argparse.Namespace(lr=0.1),
    }
    save(content, tmp_path / "model.pth.tar", zipped=zipped)
    assert b"cuda:0" in (tmp_path / "model.pth.tar").read_bytes()
    found, place, places = read_checkpoint(tmp_path / "model.pth.tar")
    check(found)
    assert place == "state_dict" and places == ["state_dict"]


def test_files_of_numpy_1_are_read(tmp_path):
    save({"state_dict": TENSORS, "best": np.float64(1)}, tmp_path / "a.pth", zipped=False)
    data = (tmp_path / "a.pth").read_bytes()
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != data
    (tmp_path / "a.pth").write_bytes(old)
    check(read_checkpoint(tmp_path / "a.pth")[0])


@pytest.mark.parametrize(
    ("content", "key", "place"),
    [
        (TENSORS, None, ""),
        ({"model": TENSORS}, None, "model"),
        ({"net": TENSORS, "epoch": 1}, None, "net"),
        ({"my_weights": TENSORS}, None, "my_weights"),
        ({"ema": TENSORS, "model_state_dict": TENSORS}, None, "model_state_dict"),
        ({"ema": TENSORS, "model_state_dict": TENSORS}, "ema", "ema"),
        ({"model": {"state_dict": TENSORS}}, None, "model.state_dict"),
        ({"student": TENSORS, "teacher": TENSORS}, "teacher", "teacher"),
        ({"val.acc": torch.tensor(0.5), "state_dict": TENSORS}, None, "state_dict"),
    ],
)
def test_where_the_state_dict_is(tmp_path, content, key, place):
    save(content, tmp_path / "a.pt")
    found, where, _ = read_checkpoint(tmp_path / "a.pt", key=key)
    check(found)
    assert where == place


def test_safetensors(tmp_path):
    safetensors.torch.save_file(dict(TENSORS), tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "without_suffix")
    found, place, _ = read_checkpoint(tmp_path / "without_suffix")
    check({name: found[name] for name in TENSORS})
    assert place == ""


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def corrupted_zip():
    buffer = io.BytesIO()
    torch.save({"state_dict": TENSORS}, buffer)
    data = bytearray(buffer.getvalue())
    data[data.index(TENSORS["module.conv1.weight"].numpy().tobytes()) + 5] ^= 1
    return bytes(data)


BAD = {
    "empty": (b"", "is empty"),
    "html": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
    "text": ("weights: ja, schöne".encode(), "is a text file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "is a Git LFS pointer"),
    "tar": (b"a" * 257 + b"ustar\x0000" + b"\0" * 500, "is a tar archive, to be unpacked first"),
    "onnx": (b"\x08\x08\x12\x07pytorch", "is an ONNX file, not a checkpoint"),
    "gzip": (b"\x1f\x8b\x08\x00\x00", "is a gzip archive, to be unpacked first"),
    "random": (np.random.default_rng(0).bytes(5000), "is not a checkpoint, or is truncated"),
    "pickle": (pickle.dumps(Evil(), 2), "was refused: reading it would run posix.mkdir"),
    "flipped bit": (corrupted_zip(), "is damaged: the checksum of .*data/0 inside it is wrong"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_what_is_no_checkpoint(tmp_path, data, message):
    path = tmp_path / "a.pth"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{path} {message}"):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", FORMATS.values(), ids=FORMATS)
def test_no_file_can_run_code(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    save({"state_dict": TENSORS, "extra": Evil()}, "a.pth", zipped=zipped)
    with pytest.raises(ValueError, match=r"was refused: reading it would run posix.mkdir"):
        read_checkpoint("a.pth")
    save(torch.nn.Linear(2, 2), "a.pth", zipped=zipped)
    with pytest.raises(ValueError, match=r"would run torch.nn.modules.linear.Linear.*state_dict"):
        read_checkpoint("a.pth")
    assert not os.path.exists("evil")


@pytest.mark.parametrize("zipped", FORMATS.values(), ids=FORMATS)
def test_truncated_files(tmp_path, zipped):
    save({"state_dict": TENSORS}, tmp_path / "a.pth", zipped=zipped)
    data = (tmp_path / "a.pth").read_bytes()
    for size in (3, 30, len(data) // 2, len(data) - 1):
        (tmp_path / "a.pth").write_bytes(data[:size])
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(tmp_path / "a.pth")


def test_other_contents(tmp_path):
    path = tmp_path / "a.pth"
    for content, message in (
        ([1, 2], "holds a list, not a state dict"),
        ({"epoch": 3, "loss": 0.1}, "holds a dict of epoch, loss, not a state dict"),
        ({"student": TENSORS, "teacher": TENSORS}, "several state dicts, 'student', 'teacher'"),
    ):
        save(content, path)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)
    with pytest.raises(ValueError, match="no state dict under 'ema'; there are 'student', 'tea"):
        read_checkpoint(path, key="ema")
    (tmp_path / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="is a Git LFS pointer"):
        read_checkpoint(tmp_path / "b.safetensors")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(ValueError, match=r"pipe.pth: It is a pipe or a device"):
        read_checkpoint(tmp_path / "pipe.pth")
    with pytest.raises(ValueError, match=r"has several checkpoints, a.pth, b.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a directory without a checkpoint file"):
        read_checkpoint(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"cannot read .*nowhere.pth: No such file"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        read_checkpoint(path)
    (tmp_path / "a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{'nonsense'}")
    with pytest.raises(ValueError, match="is not an intact safetensors file"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_without_torch(tmp_path, monkeypatch):
    save(TENSORS, tmp_path / "a.pth")
    safetensors.torch.save_file(dict(TENSORS), tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)  # what `import torch` then fails on
    with pytest.raises(ValueError, match=r"needs PyTorch.*pip install 'slimconv_jax\[torch\]'"):
        read_checkpoint(tmp_path / "a.pth")
    assert set(read_checkpoint(tmp_path / "a.safetensors")[0]) == set(TENSORS)


def test_write_checkpoint(tmp_path):
    path = tmp_path / "a.pth"
    arrays = {"conv1.weight": np.arange(4, dtype=np.float32)}
    write_checkpoint(arrays, path)
    assert torch.equal(torch.load(path)["conv1.weight"], torch.arange(4.0))
    with pytest.raises(ValueError, match=r"a.pth exists already; --overwrite"):
        write_checkpoint(arrays, path)
    write_checkpoint({"conv1.weight": np.zeros(2, np.float32)}, path, overwrite=True)
    assert torch.equal(torch.load(path)["conv1.weight"], torch.zeros(2))
    for bad, message in (
        (tmp_path, "exists already; it is a directory"),
        (tmp_path / "no" / "a.pth", "cannot write .*: No such file or directory"),
    ):
        with pytest.raises(ValueError, match=message):
            write_checkpoint(arrays, bad, overwrite=True)
    assert os.listdir(tmp_path) == ["a.pth"]


ARRAYS = {name: tensor.numpy() for name, tensor in TENSORS.items()}


def test_arrays_of_numpy_and_of_flax(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    check(read_checkpoint(tmp_path / "a.npz")[0])
    nested = {"module": {"conv1": {"weight": ARRAYS["module.conv1.weight"]}}}
    nested["module"]["bn1"] = {"bias": ARRAYS["module.bn1.bias"]}
    for name in ("a.msgpack", "without_an_ending"):
        (tmp_path / name).write_bytes(serialization.to_bytes(nested))
        check(read_checkpoint(tmp_path / name)[0])
    for name in ("a.npz", "a.msgpack"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(
            ValueError, match=r"is truncated or damaged|is not an intact msgpack file"
        ):
            read_checkpoint(tmp_path / name)
    np.savez(tmp_path / "b.npz", **{"a.b": np.array([Evil()], object)})
    with pytest.raises(
        ValueError, match="is not an intact npz file: Object arrays cannot be loaded"
    ):
        read_checkpoint(tmp_path / "b.npz")


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("content", [ARRAYS, TENSORS], ids=["numpy", "torch"])
def test_plain_pickles(tmp_path, content, protocol):
    with open(tmp_path / "a.pkl", "wb") as file:
        pickle.dump({"model": dict(content), "__author__": "someone"}, file, protocol)
    found, place, _ = read_checkpoint(tmp_path / "a.pkl")
    check(found)
    assert place == "model"


@pytest.mark.parametrize("hidden", ["alone", "in a tensor"])
def test_no_pickle_can_run_code(tmp_path, monkeypatch, hidden):
    monkeypatch.chdir(tmp_path)
    content = Evil()
    if hidden == "in a tensor":
        buffer = io.BytesIO()
        torch.save(Evil(), buffer)
        content = Loaded(buffer.getvalue())
    with open("a.pkl", "wb") as file:
        pickle.dump({"conv1.weight": content}, file)
    with pytest.raises(ValueError, match=r"was refused: reading it would run|is not a checkpoint"):
        read_checkpoint("a.pkl")
    assert not os.path.exists("evil")


class Loaded:
    """Pickled as PyTorch pickles a storage."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


def test_a_model_in_several_files(tmp_path):
    files = {}
    for number, (name, tensor) in enumerate(TENSORS.items(), 1):
        files[name] = f"model-{number:05}-of-00002.safetensors"
        safetensors.torch.save_file({name: tensor}, tmp_path / files[name])
        torch.save({name: tensor}, tmp_path / f"pytorch_model-{number:05}-of-00002.bin")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    given = (index, tmp_path, tmp_path / files["module.bn1.bias"])
    for path in (*given, tmp_path / "pytorch_model-00001-of-00002.bin"):
        check(read_checkpoint(path)[0])
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(
        ValueError, match=r"in 2 files; pytorch_model-00002-of-00002.bin is missing"
    ):
        read_checkpoint(tmp_path / "pytorch_model-00001-of-00002.bin")
    for text in ('{"weight_map": {"a": "../model.bin"}}', "[]", "{", '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(
            ValueError, match=r"is not an index of the files of a model|it is not JSON"
        ):
            read_checkpoint(index)


def test_low_precision_and_lazy_tensors(tmp_path):
    eighth = torch.ones(2, 2).to(torch.float8_e4m3fn)
    safetensors.torch.save_file({"a.b": eighth}, tmp_path / "a.safetensors")
    assert (read_checkpoint(tmp_path / "a.safetensors")[0]["a.b"].float() == 1).all()
    save({"a.b": torch.nn.UninitializedParameter(), "a.c": torch.ones(2)}, tmp_path / "a.pth")
    assert torch.nn.parameter.is_lazy(read_checkpoint(tmp_path / "a.pth")[0]["a.b"])
