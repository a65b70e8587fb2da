import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image
from processes import own_errors
from torch_state_dict import as_tensors, random_state_dict

from slimconv_jax import devices, load_model, to_torch
from slimconv_jax.__main__ import main as command_line
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.storage.model_directory import read_info
from slimconv_jax.torch_interop.reference import ResNet

SCRIPT = Path(__file__).parents[2] / "convert_weights.py"

CONFIG = ResNetConfig((1, 1, 1, 1), reduction=2, width=8, num_classes=5, stem="cifar")


@pytest.fixture(scope="module")
def state_dict():
    return random_state_dict(CONFIG)


@pytest.fixture(scope="module")
def checkpoint(state_dict, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "small.pth"
    torch.save(as_tensors(state_dict), path)
    return path


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    # The command would switch it on for all tests that follow, and write to the user's.
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)


def convert(*arguments):
    return command_line(
        ["convert", *map(str, arguments), "--image-size", "16", "--num-images", "2"]
    )


def same(path, expected):
    loaded = to_torch(load_model(path))
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


@pytest.mark.process
def test_a_file_of_the_original_training_script(tmp_path, state_dict, monkeypatch):
    """From the shell, with no option given: legacy format, `module.`, saved from a GPU."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    tensors = as_tensors(state_dict, "module.")
    tensors["module.bn1.num_batches_tracked"] = torch.tensor(9)
    path = tmp_path / "model_best.pth.tar"
    content = {
        "epoch": 90,
        "arch": "resnet50",
        "state_dict": tensors,
        "best_prec1": torch.tensor(77.23),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
    }
    torch.save(content, path, _use_new_zipfile_serialization=False)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), path.name, "output"],
        cwd=tmp_path,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, own_errors(done.stderr)) == (0, "")
    lines = done.stdout.splitlines()
    assert "model_best.pth.tar" in lines[0] and "under 'state_dict'" in lines[0]
    assert "sc_resnet14, k=4/3, 5 classes, cifar stem, width 8: " in lines[2]
    assert [line.split()[0] for line in lines[5:11]] == ["stem", *["stage"] * 4, "logits"]
    assert lines[11].strip() == "the same class comes first in 8 of 8 images"
    assert re.match(
        r"wrote   output in .* s \(reading .*, converting .*, comparing .*, wr", lines[12]
    )
    same(tmp_path / "output", state_dict)
    description = json.loads((tmp_path / "output" / "model.json").read_text())
    assert description["name"] == "sc_resnet14" and description["k"] == "4/3"
    info = description["info"]
    assert info["source"]["file"] == "model_best.pth.tar" and len(info["source"]["sha256"]) == 64
    assert len(info["parity"]["stages"]) == 6
    assert info["parity"]["stages"][-1]["max_rel_error"] < 1e-5


def test_without_a_classifier_pooled_features_are_compared(tmp_path, state_dict, capsys):
    headless = {name: v for name, v in state_dict.items() if not name.startswith("fc.")}
    torch.save(as_tensors(headless), tmp_path / "headless.pth")
    assert convert(tmp_path / "headless.pth", tmp_path / "model") == 0
    said = capsys.readouterr().out
    assert "no classifier" in said and "same class" not in said
    names = [line.split()[0] for line in said.splitlines() if "e-0" in line]
    assert names == ["stem", *["stage"] * 4, "pooled"]


def test_and_back(tmp_path, checkpoint, state_dict, capsys):
    assert convert(checkpoint, tmp_path / "model", "--format", "safetensors") == 0
    assert (tmp_path / "model" / "weights.safetensors").exists()
    export = ["export", str(tmp_path / "model"), str(tmp_path / "back.pth"), "--format", "torch"]
    assert command_line(export) == 0
    assert "net.load_state_dict" in capsys.readouterr().out
    back = torch.load(tmp_path / "back.pth")
    assert back.keys() == state_dict.keys()
    assert all(torch.equal(tensor, torch.from_numpy(state_dict[n])) for n, tensor in back.items())
    ResNet(CONFIG).load_state_dict(back, strict=True)
    assert command_line(export) == 1
    assert "exists already" in capsys.readouterr().err
    assert command_line([*export, "--overwrite"]) == 0
    assert command_line(["export", "nowhere", "b.pth", "--format", "torch"]) == 1
    assert "there is no directory" in capsys.readouterr().err


def test_gates_that_shapes_do_not_show_are_told(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, gating="plain", min_squeezed=3)
    expected = random_state_dict(config)
    torch.save(as_tensors(expected), tmp_path / "plain.pth")
    assert convert(tmp_path / "plain.pth", tmp_path / "model", "--gating", "plain") == 0
    assert "min_squeezed 3, gating plain" in capsys.readouterr().out
    assert load_model(tmp_path / "model").config == config
    same(tmp_path / "model", expected)


def test_class_names_are_kept(tmp_path, checkpoint, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\ufeffant\r\nbee\ncat\ndog\neel\n")  # as an editor of Windows has it
    arguments = (checkpoint, tmp_path / "model", "--no-parity", "--class-names", names)
    assert convert(*arguments) == 0
    assert read_info(tmp_path / "model")["class_names"] == ["ant", "bee", "cat", "dog", "eel"]
    for text, message in (
        ("ant\nbee\n", f"error: {names} names 2 classes, and the model has 5"),
        ("ant\nant\n", f"error: line 2 of {names} has 'ant' a second time"),
        ("ant\n\nbee\n", f"error: line 2 of {names} has no name"),
    ):
        names.write_text(text)
        assert convert(*arguments, "--overwrite") == 1
        assert capsys.readouterr().err.startswith(message)
    assert convert(checkpoint, tmp_path / "other", "--class-names", "nowhere") == 1
    assert capsys.readouterr().err.startswith("error: cannot read the class names in nowhere: ")


def test_safetensors_renamed_with_something_to_leave_out(tmp_path, state_dict):
    foreign = {name.replace("layer", "stages/"): a for name, a in state_dict.items()}
    foreign["aux.weight"] = np.zeros(3, np.float32)
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(foreign, path)
    options = ["--rename", r"^stages/(\d)=layer\1", "--rename", r"^aux\..*="]
    assert convert(path, tmp_path / "model", "--no-parity", *options) == 0
    same(tmp_path / "model", state_dict)
    assert read_info(tmp_path / "model")["parity"] is None


def test_photos_can_be_compared(tmp_path, checkpoint, capsys):
    (tmp_path / "photos").mkdir()
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{index}.png")
    assert convert(checkpoint, tmp_path / "model", "--images", tmp_path / "photos") == 0
    assert "2 images of 16x16 from" in capsys.readouterr().out
    (tmp_path / "photos" / "0.png").write_bytes(b"nothing")
    assert convert(checkpoint, tmp_path / "other", "--images", tmp_path / "photos") == 1
    assert "error: cannot read the image" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_weights_that_are_not_finite_are_a_warning(tmp_path, state_dict, capsys):
    bad = as_tensors(state_dict)
    bad["layer3.0.conv1.weight"][0] = np.nan
    torch.save(bad, tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", tmp_path / "model") == 0
    errors = capsys.readouterr().err
    assert "warning: these entries look damaged: layer3.0.conv1.weight (infinite or NaN)" in errors
    assert "warning: from stage 3 on, values are infinite or NaN, in PyTorch as well" in errors
    assert (tmp_path / "model").exists()


def test_blocks_of_no_known_architecture_are_a_warning(tmp_path, capsys):
    config = ResNetConfig((1, 1, 2, 1), reduction=2, width=8, num_classes=5, stem="cifar")
    torch.save(as_tensors(random_state_dict(config)), tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", tmp_path / "model", "--no-parity") == 0
    errors = capsys.readouterr().err
    assert "no architecture with these blocks" in errors and "(--arch sc_resnet14?)" in errors
    assert convert(tmp_path / "a.pth", tmp_path / "model", "--no-parity", "--overwrite") == 0


def test_beyond_the_tolerance_nothing_is_written(tmp_path, checkpoint, capsys):
    assert convert(checkpoint, tmp_path / "model", "--tolerance", "0") == 1
    errors = capsys.readouterr().err
    assert re.match(
        r"error: the model is not the published PyTorch network: \w+.* differs first, by", errors
    )
    assert os.listdir(tmp_path) == []
    # What is only rounding is gone in float64, where a ten thousandth of the tolerance decides.
    assert convert(checkpoint, tmp_path / "model", "--tolerance", "1e-8") == 0
    assert "is beyond 1e-08; again, in float64:" in capsys.readouterr().out
    parity = read_info(tmp_path / "model")["parity"]
    assert parity["dtype"] == "float64"
    assert max(stage["max_rel_error"] for stage in parity["stages"]) < 1e-12


@pytest.mark.process
def test_an_interruption_leaves_nothing(tmp_path, checkpoint):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), checkpoint, "model", "--image-size", "400"],
        cwd=tmp_path,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("parity"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, own_errors(errors)) == (130, "interrupted; nothing was written\n")
    assert [name for name in os.listdir(tmp_path) if name != "cache"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{checkpoint}", "{tmp}"], "error: {tmp} exists already; --overwrite"),
        (["{checkpoint}", "{tmp}", "--overwrite"], "error: {tmp} is not overwritten, since it is"),
        (["{checkpoint}", "{tmp}/no/a"], "error: cannot write {tmp}/no/a: there is no directory"),
        (["{checkpoint}", "/proc/a"], "error: cannot write /proc/a: "),
        (["{tmp}/nope.pth", "{tmp}/a"], "error: cannot read {tmp}/nope.pth: No such file"),
        (["{tmp}", "{tmp}/a"], "error: {tmp} is a directory without a checkpoint file"),
        (
            ["{checkpoint}", "{tmp}/a", "--arch", "resnet50"],
            "error: resnet50 was asked for, and the entries are those of sc_resnet14",
        ),
        (["{checkpoint}", "{tmp}/a", "--k", "8/3"], "error: k=8/3 was asked for"),
        (["{checkpoint}", "{tmp}/a", "--k", "oops"], "error: k='oops' is not a compression"),
        (["{checkpoint}", "{tmp}/a", "--key", "ema"], "error: {checkpoint} has no state dict"),
        (["{checkpoint}", "{tmp}/a", "--images", "nope"], "error: there is no directory nope"),
        (["{checkpoint}", "{tmp}/a", "--rename", "head=fc"], "error: rename 'head': this matches"),
        (["{checkpoint}", "{tmp}/a", "--tolerance", "nan"], "error: --tolerance=nan must be"),
        (["{checkpoint}", "{tmp}/a", "--rename", "(=x"], "error: rename '(' to 'x'"),
        (["{checkpoint}", "{tmp}/a", "--rename", "^conv1=x"], "error: the entries are not those"),
    ],
)
def test_bad_input(arguments, message, checkpoint, tmp_path, capsys):
    names = {"checkpoint": checkpoint, "tmp": tmp_path}
    arguments = [argument.format(**names) for argument in arguments]
    assert convert(*arguments) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(message.format(**names))
    assert os.listdir(tmp_path) == []


def test_without_torch(tmp_path, state_dict, monkeypatch, capsys):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(state_dict, path)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert convert(path, tmp_path / "model") == 1
    assert "error: this needs PyTorch, which is not installed: pip" in capsys.readouterr().err
    assert convert(path, tmp_path / "model", "--no-parity") == 0
    same(tmp_path / "model", state_dict)


@pytest.mark.process
def test_importing_the_package_imports_neither_torch_nor_orbax():
    code = "import slimconv_jax, sys; print({'torch', 'orbax', 'tensorflow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


class Corruptions:
    """At least 200 damaged versions of a checkpoint, each with what may come of it.

    That is "error", or the state dict that the model must have, or (in the legacy format and
    in safetensors, which have no checksums) None: what PyTorch reads from the file.
    """

    def __init__(self, state_dict, folder):
        self.state_dict = state_dict
        self.folder = folder
        self.rng = np.random.default_rng(7)

    def __iter__(self):
        yield from self.damaged_files()
        yield from self.damaged_entries()

    def damaged_files(self):
        legacy, zipped, tensors = (self.folder / f"{n}.pth" for n in ("legacy", "zip", "tensors"))
        content = {"epoch": 1, "state_dict": as_tensors(self.state_dict, "module.")}
        torch.save(content, legacy, _use_new_zipfile_serialization=False)
        torch.save(content, zipped)
        safetensors.numpy.save_file(self.state_dict, tensors)
        for path in legacy, zipped, tensors:
            data = path.read_bytes()
            for size in self.rng.integers(0, len(data), 12):
                yield f"{path.name} cut at {size}", data[:size], "error"
            # Half of the flips in the first part, where the structure is.
            for limit in [len(data)] * 12 + [len(data) // 8] * 12:
                place, bit = self.rng.integers(limit), self.rng.integers(8)
                flipped = bytearray(data)
                flipped[place] ^= 1 << bit
                expected = self.state_dict if path == zipped else None
                yield f"{path.name} bit {bit} of {place}", bytes(flipped), expected

    def damaged_entries(self):
        names = list(self.state_dict)
        matrices = [name for name, array in self.state_dict.items() if array.ndim > 1]
        for name in self.rng.choice(names, 20, replace=False):
            rest = {other: array for other, array in self.state_dict.items() if other != name}
            yield f"without {name}", rest, "error"
        for name in self.rng.choice(names, 20, replace=False):
            rest = {other: array for other, array in self.state_dict.items() if other != name}
            letter = self.rng.integers(len(name))
            new = name[:letter] + "#" + name[letter + 1 :]
            yield f"{name} as {new}", rest | {new: self.state_dict[name]}, "error"
        for part in ("layer1.0.", "layer2.0.conv2.", "downsample", "bn3", "conv2_2.3", "fc.weight"):
            rest = {name: a for name, a in self.state_dict.items() if part not in name}
            yield f"without {part}", rest, "error"
            renamed = {name.replace(part, "x"): a for name, a in self.state_dict.items()}
            yield f"{part} as x", renamed, "error"
            flat = {
                name: a.reshape(len(a), -1) if part in name else a
                for name, a in self.state_dict.items()
                if part not in name or a.ndim > 1
            }
            same = all(a.shape == flat[n].shape for n, a in self.state_dict.items() if n in flat)
            whole = same and len(flat) == len(self.state_dict)
            yield f"{part} flattened", flat, flat if whole else "error"
        for name in self.rng.choice(matrices, 20, replace=False):
            turned = self.state_dict | {name: np.moveaxis(self.state_dict[name], 0, 1)}
            square = turned[name].shape == self.state_dict[name].shape
            yield f"{name} transposed", turned, turned if square else "error"
        for name in self.rng.choice(names, 20, replace=False):
            dtype = self.rng.choice(["float16", "float64", "int32", "bool", "complex64"])
            retyped = self.state_dict | {name: self.state_dict[name].astype(dtype)}
            kept = retyped | {name: retyped[name].astype(np.float32)} if "float" in dtype else None
            yield f"{name} as {dtype}", retyped, kept or "error"
        for name, other in self.rng.choice(names, (20, 2)):
            one, two = self.state_dict[name], self.state_dict[other]
            swapped = self.state_dict | {name: two, other: one}
            yield (
                f"{name}, {other} swapped",
                swapped,
                swapped if one.shape == two.shape else "error",
            )


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_corrupted_checkpoints(tmp_path, state_dict, capsys, every):
    """Each ends in one clean error and nothing written, or in the model that the file holds."""
    count = right = 0
    for what, content, expected in itertools.islice(
        Corruptions(state_dict, tmp_path), 0, None, every
    ):
        path, output = tmp_path / "a.pth", tmp_path / "output"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(as_tensors(content), path)
        with np.errstate(all="ignore"):
            status = convert(path, output, "--format", "safetensors")
        errors = capsys.readouterr().err
        if status:
            assert not output.exists(), what
            assert errors.count("error: ") == 1 and "Traceback" not in errors, (what, errors)
            assert expected is None or expected == "error" or isinstance(content, bytes), what
        else:
            assert expected != "error", what
            if expected is None:
                expected = read_with_the_libraries(path)
            same(output, expected)
            right += 1
            shutil.rmtree(output)
        count += 1
    assert count >= 200 / every and right >= 20 / every
    assert not any(name.startswith(".") for name in os.listdir(tmp_path))


def read_with_the_libraries(path):
    try:
        content = torch.load(path, weights_only=True)["state_dict"]
        return {name.removeprefix("module."): tensor.numpy() for name, tensor in content.items()}
    except Exception:
        return safetensors.numpy.load_file(path)
