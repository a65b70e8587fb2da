"""README.md and docs/: their snippets of Python as they stand, links, and commands."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from randomize import randomized

from slimconv_jax import save_model
from slimconv_jax.__main__ import COMMANDS
from slimconv_jax.models.zoo import abstract_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def blocks(page):
    """The language and the text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A directory with a model in place of the digits run, whose training takes minutes."""
    (tmp_path / "runs").mkdir()
    model = randomized(lambda: abstract_model("sc_resnet14", width=8, num_classes=10, stem="cifar"))
    info = {"preprocessing": {"image_size": None}, "image_shape": [32, 32, 3]}
    info["class_names"] = list("0123456789")
    save_model(model, tmp_path / "runs" / "digits", info=info)
    config = {"dataset": {"name": "digits"}}
    (tmp_path / "runs" / "digits" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_links_lead_somewhere():
    for page in (*PAGES, *ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")):
        for link in re.findall(r"\]\(([^)]*)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)


def test_the_commands_are_those_that_there_are():
    for page in PAGES:
        for command in re.findall(r"slimconv ([a-z]+)", page.read_text()):
            assert command in COMMANDS, (page.name, command)


WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.process
@pytest.mark.parametrize("page", WITH_PYTHON, ids=[page.name for page in WITH_PYTHON])
def test_the_snippets_run(page, workdir, capsys):
    namespace, printed = {}, {}
    for number, (language, text) in enumerate(found := blocks(page)):
        if language == "json":  # as in "channels.json"
            Path("channels.json").write_text(text)
        elif language == "bash":
            for command in re.findall(r"^slimconv (export .*)", text, re.M):
                arguments = shlex.split(command, comments=True)
                if any(arguments[2] in text for language, text in found if language == "python"):
                    subprocess.run([sys.executable, "-m", "slimconv_jax", *arguments], check=True)
        elif language == "python":
            exec(compile(text, f"{page.name}, block {number}", "exec"), namespace)
            printed[number] = capsys.readouterr().out
            following = found[number + 1] if number + 1 < len(found) else ("python", "")
            if following[0] == "":
                assert printed[number].endswith(following[1])
    # What the comments say.
    for name, shape in (("logits", (1, 1000)), ("pooled", (1, 2048))):
        if page.name == "models.md":
            assert namespace[name].shape == shape
    if page.name == "models.md":
        assert [m.shape[1:] for m in namespace["maps"]] == [
            (56, 56, 256),
            *((28, 28, c) for c in (512, 1024, 2048)),
        ]
        sc, model = namespace["sc"], namespace["model"]
        assert (sc.count_params(model), sc.count_macs(model, 224)) == (12_098_388, 1_880_314_624)
    if page.name == "networks.md":
        assert namespace["y"].shape == (8, 28, 28, 256)
    if page.name == "inference.md":
        assert namespace["logits"].shape == (5, 10)
