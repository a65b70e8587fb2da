import re
import subprocess
import sys

import pytest

from slimconv_jax.__main__ import main


def test_summary_is_a_tree_of_the_layers(capsys):
    assert main(["summary", "sc_resnet14", "--k", "8/3", "--image-size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "type", "output", "parameters", "MACs"]
    assert lines[1].split()[:4] == ["sc_resnet14", "ResNet", "1000", "6,338,596"]
    assert any(line.split()[:3] == ["stages.0.0", "Bottleneck", "16x16x256"] for line in lines)
    assert any(line.startswith("    conv2 ") and "SlimConv" in line for line in lines)
    assert "one image of 64x64 pixels" in lines[-1]


def test_list_has_every_published_row():
    # In a process of its own, as a user runs it; the figures are those of the paper.
    command = [sys.executable, "-m", "slimconv_jax", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {tuple(line.split()[:2]): line for line in done.stdout.splitlines() if line.strip()}
    for row, counts in {
        ("resnet50", "-"): "25,557,032 4,089,184,256",
        ("sc_resnet50", "4/3"): "16,758,740 2,652,222,208",
        ("sc_resnet50", "8/3"): "12,098,388 1,880,314,624",
        ("sc_resnext101_32x3d", "2"): "23,698,976 4,580,553,984",
    }.items():
        assert counts in re.sub(" +", " ", rows[row])
    assert "16.76 M, 2.65 G, top-1 error 22.77 %" in rows["sc_resnet50", "4/3"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summary", "sc_resnet51"], "unknown model 'sc_resnet51'; did you mean sc_resnet50"),
        (["summary", "resnet50", "--k", "2"], "resnet50 has no SlimConv"),
        (["summary", "resnet14", "--image-size", "0"], "image_size=0 must be an integer >= 1"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, capsys):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m slimconv_jax summary resnet50 | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("layer") and done.stderr == ""
