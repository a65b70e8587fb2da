"""The scripts in examples/, each as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import own_errors

EXAMPLES = Path(__file__).parents[1] / "examples"


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
