"""The package without a clone: its wheel, in an empty directory, by the installed command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_files import encode, smooth
from processes import own_errors
from torch_state_dict import as_tensors, random_state_dict

from slimconv_jax.models.resnet import ResNetConfig

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def slimconv(tmp_path_factory):
    """Runs the installed command; nothing of the clone is on its path."""
    root = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for command in (
        ["wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", root, ROOT],
        [
            *("install", "--no-index", "--no-deps", "--target", root / "site"),
            *("--find-links", root, "slimconv_jax"),
        ],
    ):
        subprocess.run([*pip, *command], check=True, cwd=root)
    place = root / "empty"
    place.mkdir()
    env = os.environ | {"PYTHONPATH": str(root / "site"), "XDG_CACHE_HOME": str(root / "cache")}

    def run(*arguments):
        command = [sys.executable, root / "site" / "bin" / "slimconv", *arguments]
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "error" not in own_errors(done.stderr) and "Traceback" not in done.stderr
        return done.stdout

    code = "import slimconv_jax; print(slimconv_jax.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True
    )
    assert where.stdout.startswith(str(root / "site"))
    run.place = place
    return run


def test_every_command_runs(slimconv):
    small = ("--config.model.width=8", "--config.num_epochs=1", "--config.batch_size=256")
    said = slimconv("train", "--config", "digits", *small)
    assert "runs/digits --checkpoint 6\n" in said
    assert "top-1 " in slimconv("evaluate", "runs/digits", "--json", "figures.json")
    assert json.loads((slimconv.place / "figures.json").read_text())["examples"] == 360
    (slimconv.place / "a.png").write_bytes(encode(smooth(32, 32)))
    assert len(slimconv("predict", "runs/digits", "a.png").splitlines()) == 6
    assert "wrote out" in slimconv("export", "runs/digits", "out", "--format", "safetensors")
    config = ResNetConfig((1, 1, 1, 1), reduction=2, width=8, num_classes=5, stem="cifar")
    torch.save(as_tensors(random_state_dict(config)), slimconv.place / "a.pth")
    said = slimconv("convert", "a.pth", "converted", "--image-size", "16")
    assert "the same class comes first in 8 of 8 images" in said
    assert "6,338,596" in slimconv("summary", "sc_resnet14", "--k", "8/3", "--image-size", "64")
    assert "sc_resnet50 --k 4/3" in slimconv("list", "--published")
    options = ("--image-size", "32", "--batch-size", "1", "--repeats", "1")
    assert "resnet14" in slimconv("benchmark", "resnet14", *options, "--implementation", "jax")
    assert "--topology NAME" in slimconv("plan", "--help")
    assert "config.model.k" in slimconv("train", "--config", "imagenet:resnet50", "--help-config")
