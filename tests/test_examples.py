"""The scripts in examples/, each as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import own_errors

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "least"),  # per cent of what the script counts; guessing gives 10
    [("dense_prediction", 60), ("linen_model", 80), ("nnx_model", 80)],
)
def test_an_example_learns(name, least, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(re.search(r"([\d.]+)%", done.stdout)[1]) >= least
    assert own_errors(done.stderr) == ""
    for path in tmp_path.iterdir():
        assert f"wrote {path.name}" in done.stdout and path.stat().st_size > 10_000


def test_every_example_is_run():
    assert sorted(p.stem for p in EXAMPLES.glob("*.py")) == [
        "dense_prediction",
        "linen_model",
        "nnx_model",
    ]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    accuracies = [float(share) for share in re.findall(r"([\d.]+)% of", printed)]
    assert len(accuracies) == 3 and accuracies[0] > 90 and accuracies[1] > 60
    assert accuracies[2] == 100
    assert "2 of 3 3x3 convolutions replaced" in printed
