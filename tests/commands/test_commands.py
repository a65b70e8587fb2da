import subprocess
import sys

import pytest
from processes import own_errors

from slimconv_jax.__main__ import main
from slimconv_jax.models.slimconv import reduction_from_k
from slimconv_jax.models.zoo import ARCHITECTURES

IMAGENET = [  # parameters and multiply-adds at 1000 classes, 224x224
    ("resnet50", None, 25_557_032, 4_089_184_256),
    ("resnet101", None, 44_549_160, 7_801_405_440),
    ("resnet152", None, 60_192_808, 11_513_626_624),
    ("resnext50_32x4d", None, 25_028_904, 4_230_479_872),
    ("resnext101_32x8d", None, 88_791_336, 16_414_015_488),
    ("wide_resnet50_2", None, 68_883_240, 11_398_021_120),
    ("wide_resnet101_2", None, 126_886_696, 22_753_050_624),
    ("sc_resnet50", "4/3", 16_758_740, 2_652_222_208),
    ("sc_resnet50", "8/3", 12_098_388, 1_880_314_624),
    ("sc_resnet101", "4/3", 27_956_708, 4_822_303_488),
    ("sc_resnet152", "4/3", 37_181_908, 6_992_372_480),
    ("sc_resnext50_32x4d", "4/3", 22_492_512, 3_821_358_080),
    ("sc_resnext101_32x8d", "4/3", 79_117_208, 14_488_424_448),
    ("sc_resnext101_32x3d", "2", 23_698_976, 4_580_553_984),
    ("sc_wide_resnet50_2", "4/3", 36_196_992, 6_061_214_720),
    ("sc_wide_resnet101_2", "4/3", 65_242_784, 11_684_416_512),
]


def test_summary_is_a_tree_of_the_layers(capsys):
    assert main(["summary", "sc_resnet14", "--k", "8/3", "--image-size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "type", "output", "parameters", "MACs"]
    assert lines[1].split()[:4] == ["sc_resnet14", "ResNet", "1000", "6,338,596"]
    assert any(line.split()[:3] == ["stages.0.0", "Bottleneck", "16x16x256"] for line in lines)
    assert any(line.startswith("    conv2 ") and "SlimConv" in line for line in lines)
    assert "one image of 64x64 pixels" in lines[-1]


@pytest.mark.process
def test_list_has_every_published_row():
    # In a process of its own, as a user runs it.
    command = [sys.executable, "-m", "slimconv_jax", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert own_errors(done.stderr) == ""
    rows = {tuple(line.split()[:2]): line for line in done.stdout.splitlines() if line.strip()}
    for name, k, params, macs in IMAGENET:
        assert rows[name, k or "-"].split()[2:4] == [f"{params:,}", f"{macs:,}"]
        # The k of a row is also the architecture's own, but for the one at 8/3.
        own = ARCHITECTURES[name].reduction
        assert k == "8/3" or own == (k and reduction_from_k(k))
    assert rows["resnet18", "-"].split()[2] == "11,689,512"
    assert rows["resnet34", "-"].split()[2] == "21,797,672"
    assert "16.76 M, 2.65 G, top-1 error 22.77 %" in rows["sc_resnet50", "4/3"]


@pytest.mark.long
def test_the_published_table(capsys):
    assert main(["list", "--published"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "ResN" in line]
    assert len(rows) == 7
    assert rows[0].split()[-8:] == [
        *("16.76", "16,758,740", "2.65", "2,652,222,208", "22.77"),
        *("sc_resnet50", "--k", "4/3"),
    ]
    ghost = ["13.95", "13,953,512", "2.15", "2,151,023,360", "24.99", "ghost_resnet50"]
    assert rows[4].split()[-6:] == ghost
    assert [row.split()[0] for row in rows if "differs" in row] == ["Sc-ResNet-101"]
    assert "differs: FLOPs would be 4.82" in rows[2]
    assert rows[5].split()[1:6] == ["23.18", "-", "2.80", "-", "23.50"]


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


@pytest.mark.process
def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m slimconv_jax summary resnet50 | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("layer") and own_errors(done.stderr) == ""
