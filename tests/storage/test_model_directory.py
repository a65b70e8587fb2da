import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from randomize import randomized

import slimconv_jax as sc
from slimconv_jax import load_model, save_model
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.models.zoo import abstract_resnet
from slimconv_jax.storage import model_directory
from slimconv_jax.storage.model_directory import (
    _WEIGHTS,
    FORMATS,
    _new_directory,
    check_destination,
)

CONFIG = ResNetConfig(
    (1, 1, 2, 1), reduction=3, width=8, num_classes=3, dilation=(False, False, True)
)


@pytest.fixture(scope="module")
def model():
    return randomized(lambda: abstract_resnet(CONFIG))


def same(one, other):
    one, other = (nnx.to_flat_state(nnx.state(model)) for model in (one, other))
    assert [path for path, _ in one] == [path for path, _ in other]
    for (_, a), (_, b) in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a[...], b[...])


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_comes_back_as_it_was(tmp_path, model, format):
    path = tmp_path / "model"
    save_model(model, path, format=format, info={"source": {"file": "a.pth"}})
    back = load_model(path)
    same(model, back)
    assert back.config == CONFIG
    assert back.stem.bn.use_running_average  # evaluation mode
    assert load_model(path, dtype="bfloat16").stem.conv.dtype == jnp.bfloat16
    assert os.listdir(tmp_path) == ["model"]
    description = json.loads((path / "model.json").read_text())
    assert description["name"] is None and description["k"] == "2"
    assert description["info"]["source"] == {"file": "a.pth"}
    assert set(description["versions"]) == {"slimconv_jax", "jax", "flax", "orbax-checkpoint"}


def test_a_model_on_many_devices_is_saved_as_one_on_one(tmp_path, model):
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    replicated = nnx.clone(model)
    for variable in replicated.stem.conv.kernel, replicated.classifier.bias:
        variable.set_value(jax.device_put(variable[...], everywhere))
    save_model(replicated, tmp_path / "model")
    back = load_model(tmp_path / "model")
    same(model, back)
    assert len(back.stem.conv.kernel[...].devices()) == 1


def test_a_clone_that_is_not_installed_knows_its_version(monkeypatch):
    version = importlib.metadata.version

    def installed(name):
        if name == "slimconv_jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert model_directory.versions()["slimconv_jax"] == sc.__version__


def test_nothing_is_overwritten_unless_asked(tmp_path, model):
    path = tmp_path / "model"
    save_model(model, path, format="safetensors")
    other = randomized(lambda: abstract_resnet(CONFIG), seed=1)
    with pytest.raises(ValueError, match="model exists already; --overwrite"):
        save_model(other, path)
    same(model, load_model(path))
    save_model(other, path, overwrite=True)
    same(other, load_model(path))
    assert sorted(os.listdir(path)) == ["model.json", "weights"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "model.json").write_text("{}")  # of another program
    with pytest.raises(ValueError, match=r"home is not overwritten, .* no model.json of ours"):
        save_model(model, tmp_path / "home", overwrite=True)
    (path / "weights" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not just a saved model: weights/precious.txt is in it"):
        save_model(model, path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["home", "model"]


FULL_DISK = """
import resource, signal, sys
from slimconv_jax import load_model, save_model

model = load_model(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # bytes in a file
for path in sys.argv[1], sys.argv[1] + "2":
    try:
        save_model(model, path, format=sys.argv[2], overwrite=True)
    except ValueError as error:
        print(error)
"""


@pytest.mark.process
@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_what_was_there(tmp_path, model, format):
    # In a process of its own, which may write small files only.
    path = tmp_path / "model"
    save_model(model, path)
    command = [sys.executable, "-c", FULL_DISK, path, format]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"cannot write {path}: " in done.stdout and f"cannot write {path}2: " in done.stdout
    same(model, load_model(path))
    assert os.listdir(tmp_path) == ["model"]


def test_info_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, model):
    with pytest.raises(ValueError, match=r"info must be what JSON can hold: .*ndarray"):
        save_model(model, tmp_path / "model", info={"x": np.ones(2)})
    assert not os.listdir(tmp_path)


def test_info_cannot_change_what_is_needed_to_load(tmp_path, model):
    save_model(model, tmp_path / "model", info={"format": "none", "architecture": {}, "a": 1})
    same(model, load_model(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"^dtype='floaty' is not a dtype"):
        load_model(tmp_path / "model", dtype="floaty")


def test_where_nothing_can_be_written(tmp_path, model):
    with pytest.raises(ValueError, match=f"there is no directory {tmp_path}/no"):
        save_model(model, tmp_path / "no" / "model")
    with pytest.raises(ValueError, match="cannot write /proc/model: "):
        check_destination("/proc/model", overwrite=False)
    with pytest.raises(ValueError, match="format='pickle' must be one of 'orbax', 'safetensors'"):
        save_model(model, tmp_path / "model", format="pickle")
    with pytest.raises(ValueError, match="takes a slimconv_jax ResNet, not a Linear"):
        save_model(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_no_complete_model(tmp_path, model, format):
    path = tmp_path / "model"
    with pytest.raises(ValueError, match=r"there is no directory .*model$"):
        load_model(path)
    save_model(model, path, format=format)
    file = path / "model.json"
    description = json.loads(file.read_text())

    def broken(change, message):
        file.write_text(change)
        with pytest.raises(ValueError, match=message):
            load_model(path)

    broken('{"name": ', "model.json is damaged: it is not JSON")
    broken("[]", "model.json does not describe a model")
    broken("{}", "model.json does not describe a model: KeyError 'architecture'")
    architecture = description["architecture"]
    for changed, message in (
        (architecture | {"depth": 3}, "model.json does not describe a model: .*depth"),
        (architecture | {"width": 0}, "model.json does not describe a model: .*width=0"),
        (architecture | {"blocks": 7}, "model.json does not describe a model"),
        (architecture | {"num_classes": 4}, "weights.* are not those of model.json's architecture"),
    ):
        broken(json.dumps(description | {"architecture": changed}), message)
    broken(json.dumps(description | {"format": "pickle"}), "does not describe a model.*pickle")

    file.write_text(json.dumps(description))
    for weights in [file for file in (path / _WEIGHTS[format]).rglob("*") if file.is_file()] or [
        path / _WEIGHTS[format]
    ]:
        data = weights.read_bytes()
        for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])) if data else (b"x",):
            weights.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{weights} is damaged: its SHA-256 is not"):
                load_model(path)
        weights.unlink()
        with pytest.raises(ValueError, match=f"cannot read {weights}: No such file"):
            load_model(path)
        weights.write_bytes(data)
    load_model(path)


def test_an_interruption_while_threads_still_write_leaves_nothing(tmp_path):
    def write(directory):
        for number in range(300):
            try:
                (directory / str(number)).mkdir()
            except FileNotFoundError:  # its parent is gone
                return
            time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt), _new_directory(tmp_path / "m", overwrite=False) as part:
        thread = threading.Thread(target=write, args=(part,))
        thread.start()
        while not any(part.iterdir()):
            time.sleep(0.001)
        raise KeyboardInterrupt
    thread.join()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_deleted_is_named(tmp_path, monkeypatch, capsys):
    def refuse(self, missing_ok):
        raise PermissionError(13, "Permission denied")

    directory = model_directory.epath.Path(tmp_path / "d")
    monkeypatch.setattr(type(directory), "rmtree", refuse)
    monkeypatch.setattr(model_directory.time, "sleep", lambda seconds: None)
    model_directory._delete(directory)
    said = f"warning: {directory} cannot be deleted: Permission denied\n"
    assert capsys.readouterr().out == said
