"""Hostile and damaged input: a sentence in bounded time and memory, and nothing is written."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import hostile
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx
from torch_state_dict import as_tensors, random_state_dict

import slimconv_jax as sc
from slimconv_jax.errors import InputError
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.torch_interop.checkpoint_file import read_checkpoint

ROOT = Path(__file__).parents[1]
SECONDS, KILOBYTES = 10, 2_000_000


@pytest.fixture(scope="module")
def good_checkpoints(tmp_path_factory):
    """A checkpoint of each format that is as it should be."""
    root = tmp_path_factory.mktemp("good")
    config = ResNetConfig((1, 1, 1, 1), reduction=2, width=16, num_classes=10)
    state_dict = random_state_dict(config)
    torch.save(as_tensors(state_dict), root / "good.pth")
    torch.save(as_tensors(state_dict), root / "old.pth", _use_new_zipfile_serialization=False)
    np.savez(root / "good.npz", **state_dict)
    safetensors.numpy.save_file(state_dict, root / "good.safetensors")
    index = {"weight_map": dict.fromkeys(state_dict, "good.safetensors")}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="module")
def good(good_checkpoints):
    """A file of each kind that is as it should be."""
    root = good_checkpoints
    model = sc.create_model("sc_resnet14", width=8, num_classes=10, rngs=nnx.Rngs(0))
    for format in ("orbax", "safetensors"):
        sc.save_model(model, root / format, format=format, info={"class_names": list("0123456789")})
    channels = {"stem": 60, "stages": [[[40, 52, 232]], [[96, 120, 480]], [[200, 256, 960]]]}
    channels["stages"].append([[512, 480, 2040]])
    (root / "channels.json").write_text(json.dumps(channels))
    settings = ("num_epochs=1", "model.width=8", "optimizer.warmup_epochs=0.5")
    command = ["train.py", "--config=configs/digits.py", f"--workdir={root / 'run'}"]
    command += [f"--config.{text}" for text in settings]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    return root


def contents(directory):
    """A digest of all that is in a directory."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        digest.update(f"{path} {path.lstat().st_mode} {path.lstat().st_size}".encode())
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**25:
            digest.update(path.read_bytes())
    return digest.digest()


class Opener:
    """A process that opens what it is told to, replaced when it does not come back."""

    def __init__(self):
        self._process = None

    def open(self, command, seconds=60):
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, hostile.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            )
            if command:  # what it imports and compiles the first time does not count
                self.open([])
        process = self._process
        killer = threading.Timer(seconds, process.kill)
        killer.start()
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        killer.cancel()
        return (
            json.loads(answer) if answer else {"status": "killed", "said": "", "seconds": seconds}
        )

    def close(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture(scope="module")
def opener():
    opener = Opener()
    yield opener
    opener.close()


def complaint(opener, seed, directory, good):
    """What is wrong with how an input is dealt with; None if nothing is."""
    kind, command = hostile.make(seed, directory, good)
    before = contents(directory)
    answer = opener.open(command)
    out = directory / "out"
    wrong = []
    lines = [line for line in answer["said"].splitlines() if line.startswith("error: ")]
    if answer["status"] == 1 and len(lines) != 1:
        wrong.append("no sentence")
    passes = ("bytes", "pickle inside", "json", "height")  # what damage may leave as it was
    if answer["status"] == 0 and not any(word in kind for word in passes):
        wrong.append("taken")
    if answer["status"] not in (0, 1) or "Traceback" in answer["said"]:
        wrong.append("no clean end")
    if answer["seconds"] > SECONDS or answer.get("kB", 0) > KILOBYTES:
        wrong.append("too much")
    if answer["status"] == 0 and out.exists() and command[0] in ("convert", "export"):
        shutil.rmtree(out)  # of damage that does not matter
    if contents(directory) != before:
        wrong.append("something was written")
    told = {"seed": seed, "kind": kind, "wrong": wrong, **answer}
    print(json.dumps({**told, "said": answer["said"][-300:]}))
    return told if wrong else None


REASONS = {
    **dict.fromkeys(
        ("expanded", "many expanded", "zeros"), "claims [0-9,]+; at most [0-9,]+ are allowed"
    ),
    "memory": "claims|Unable to allocate",
    "code": "was refused: reading it would run",
    "long name": "has [0-9,]+ characters; at most 1000 are allowed",
    **dict.fromkeys(("tuples", "keys"), "has more than 10,000,000 items"),
    "in disguise": "has more than 10,000,000 items|damaged: 'ascii' codec",
    "many files": "is part of a model in [0-9]+ files, according to its name",
}
"""What the sentence about some kinds must say, so that it is not another one after much work."""


@pytest.mark.parametrize("kind", dict.fromkeys(hostile.CHECKPOINTS))
def test_hostile_checkpoints_are_sentences(tmp_path, good_checkpoints, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        _, (_, path, *_) = hostile.checkpoint(rng, tmp_path, good_checkpoints, kind)
        with pytest.raises(ValueError, match=REASONS.get(kind)) as error:
            sc.from_torch(read_checkpoint(path)[0])
        assert isinstance(error.value, InputError)
        if os.path.exists(path):
            os.remove(path) if not os.path.isdir(path) else os.rmdir(path)
    assert not (tmp_path / "evil").exists()


SEEDS = range(*map(int, os.environ.get("SLIMCONV_SEEDS", "0 300").split()))


@pytest.mark.slow
def test_300_inputs_of_strangers(tmp_path, good, opener):
    found = []
    for seed in SEEDS:
        directory = tmp_path / str(seed)
        directory.mkdir()
        found.append(complaint(opener, seed, directory, good))
        shutil.rmtree(directory)
    assert not (ROOT / "evil").exists()
    assert not [*filter(None, found)]
