"""The README's snippets of Python, as they stand, in order, with the exports that they load."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from randomize import randomized

from slimconv_jax import save_model
from slimconv_jax.models.zoo import abstract_model

README = Path(__file__).parents[1] / "README.md"


def blocks():
    """The language and the text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A directory with a model in place of the digits run, whose training takes minutes."""
    (tmp_path / "runs").mkdir()
    model = randomized(lambda: abstract_model("sc_resnet14", width=8, num_classes=10, stem="cifar"))
    info = {"preprocessing": {"image_size": None}, "image_shape": [32, 32, 3]}
    save_model(model, tmp_path / "runs" / "digits", info=info)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_links_lead_somewhere():
    for page in (README, *README.parent.glob("*/*.md")):
        for link in re.findall(r"\]\(([^)]*)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)


def test_the_snippets_run(workdir, capsys):
    namespace, printed = {}, {}
    for number, (language, text) in enumerate(blocks()):
        if language == "python":
            exec(compile(text, f"README.md, block {number}", "exec"), namespace)
            printed[number] = capsys.readouterr().out
        elif language == "json":  # as in "channels.json"
            Path("channels.json").write_text(text)
            assert abstract_model("channels.json").config.blocks == (2, 1, 1, 1)
        elif language == "bash":
            for command in re.findall(
                r"^python (-m slimconv_jax export .*--format (?:stablehlo|onnx).*)", text, re.M
            ):
                subprocess.run([sys.executable, *command.split()], check=True)
        elif number - 1 in printed:  # the output of the snippet before
            assert printed[number - 1] == text
    # What the comments say.
    sc, model, maps = (namespace[name] for name in ("sc", "model", "maps"))
    assert sc.count_params(model) == 12_098_388 and sc.count_macs(model) == 1_880_314_624
    assert namespace["y"].shape == (8, 28, 28, 256) and namespace["logits"].shape == (5, 10)
    assert [m.shape[1:] for m in maps] == [(56, 56, 256), *((28, 28, c) for c in (512, 1024, 2048))]
    assert namespace["pooled"].shape == (1, 2048)
