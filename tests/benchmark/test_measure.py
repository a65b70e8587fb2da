import dataclasses
import json
import sys

import jax
import pytest

from slimconv_jax.__main__ import main
from slimconv_jax.benchmark import measure, report
from slimconv_jax.benchmark.measure import Case
from slimconv_jax.models.complexity import count_macs, count_params
from slimconv_jax.models.zoo import abstract_model

CASE = Case("sc_resnet14@4/3", "inference", 2, 32, "float32", "jax")


@pytest.fixture
def caching():
    """Restores what the command switches off."""
    enabled = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)


def test_programs_take_turns():
    calls = []

    def program(name):
        return lambda rounds: calls.append((name, rounds))

    times = measure.take_turns([program("a"), program("b")], repeats=3, seconds=1e-9)
    assert [len(measured) for measured in times] == [3, 3]
    assert all(seconds > 0 for measured in times for seconds in measured)
    assert calls[:4] == [("a", 1), ("a", 1), ("b", 1), ("b", 1)]
    # Each turn: one round that does not count, then the measured ones.
    assert [name for name, _ in calls[4:]] == list("aabb") * 3


def test_a_turn_has_as_many_rounds_as_take_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def program(rounds):
        now[0] += 0.25 * rounds

    assert measure.take_turns([program], repeats=2, seconds=1.0) == [[0.25, 0.25]]
    assert now[0] == 0.25 * (2 + 2 * (1 + 4))


@pytest.mark.long
def test_onnxruntime_runs_what_is_exported():
    case = dataclasses.replace(CASE, implementation="onnxruntime")
    program = measure.build(case)
    program.run(2)
    assert program.compile_seconds is None and program.memory is None


def test_onnxruntime_is_for_inference_in_float32(capsys):
    for options in (["--mode", "train"], ["--dtype", "bfloat16"]):
        assert main(["benchmark", "resnet14", "--implementation", "onnxruntime", *options]) == 1
        assert "onnxruntime is for --mode inference and --dtype float32" in capsys.readouterr().err


def test_plan_puts_together_what_is_compared():
    groups = measure.plan(
        ["sc_resnet14", "sc_resnet14@8/3", "resnet14", "sc_resnet14@4/3"],
        modes=["inference", "train"],
        batch_sizes=[1, 8],
        image_size=32,
        dtypes=["float32"],
        implementations=["jax", "torch"],
    )
    assert [(group[0].mode, group[0].batch_size) for group in groups] == [
        ("inference", 1),
        ("inference", 8),
        ("train", 1),
        ("train", 8),
    ]
    cases = [(case.model, case.implementation) for case in groups[0]]
    models = "sc_resnet14@4/3", "sc_resnet14@8/3", "resnet14"
    assert cases == [(model, program) for model in models for program in ("jax", "torch")]


@pytest.mark.long
def test_measured_figures_agree_with_each_other():
    case = dataclasses.replace(CASE, model="resnet14", mode="train")
    cases = [case, dataclasses.replace(case, implementation="torch")]
    rows = measure.measure(cases, repeats=2)
    macs = count_macs(abstract_model("resnet14"), 32)
    for row, case in zip(rows, cases, strict=True):
        assert row.items() >= dataclasses.asdict(case).items()
        assert 0 < row["slowest"] <= row["images_per_second"] <= row["fastest"]
        # Two FLOPs for each multiply-add, three times in a step.
        assert row["flops_per_second"] == pytest.approx(6 * macs * row["images_per_second"])
        assert row["peak_share"] * row["peak"] == pytest.approx(row["flops_per_second"])
        assert 1e9 < row["peak"] < 1e14
    ours, theirs = rows
    assert ours["compile_seconds"] > 0 and theirs["compile_seconds"] is None
    # At least parameters and momentum, of 4 bytes each.
    assert ours["memory_bytes"] > 8 * count_params(abstract_model("resnet14"))
    assert theirs["memory_bytes"] is None


@pytest.mark.long
def test_without_pytorch_the_rest_is_measured(monkeypatch, capsys, caching):
    monkeypatch.setitem(sys.modules, "torch", None)  # what `import torch` then fails on
    assert main(["benchmark", "resnet14", "--implementation", "torch"]) == 1
    assert "pip install" in capsys.readouterr().err
    command = ["benchmark", "resnet14", "--image-size", "32", "--batch-size", "2", "--repeats", "1"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "nothing is compared with PyTorch: " in printed.err
    assert "resnet14 " in printed.out and "torch" not in printed.out.split("inference, ")[1]


def row(model, implementation, speed, macs=1e9):
    case = dataclasses.replace(CASE, model=model, implementation=implementation)
    return dataclasses.asdict(case) | {
        "images_per_second": speed,
        "slowest": speed - 1,
        "fastest": speed + 2,
        "compile_seconds": 1.25 if implementation == "jax" else None,
        "memory_bytes": 3 * 2**20 if implementation == "jax" else None,
        "flops_per_second": 2 * macs * speed,
        "peak_share": 0.5,
    }


ROWS = [
    row("sc_resnet50@8/3", "jax", 40.0),
    row("sc_resnet50@8/3", "torch", 32.0),
    row("resnet50", "jax", 20.0, macs=2e9),
]


def test_table_and_ratios():
    lines = [line.split() for line in report.table_rows(ROWS)]
    expected = "sc_resnet50@8/3 jax 40.0 39.0 - 42.0 1.2 s 3 M 80 50%"
    assert lines[0] == expected.split()
    expected = "sc_resnet50@8/3 torch 32.0 31.0 - 34.0 - - 64 50%"
    assert lines[1] == expected.split()
    assert list(report.ratios(ROWS)) == [
        "sc_resnet50@8/3: 1.25 x torch",
        "sc_resnet50@8/3: 2.00 x resnet50, which has 2.00 x its multiply-adds",
    ]
    width = len(report.HEADER)
    assert all(len(line) == width for line in report.table_rows(ROWS))


@pytest.mark.long
def test_the_command_prints_writes_and_draws(tmp_path, capsys, caching):
    figures, chart = tmp_path / "figures.json", tmp_path / "chart.png"
    command = ["benchmark", "resnet14", "--image-size", "32", "--batch-size", "1", "2"]
    command += ["--repeats", "2", "--implementation", "jax"]
    assert main([*command, "--json", str(figures), "--chart", str(chart)]) == 0
    out, progress = capsys.readouterr()
    assert "building 1 of 1: resnet14 in jax\nmeasuring 1 programs in 2 turns" in progress
    assert "inference, float32, batches of 2, 32x32" in out
    assert chart.read_bytes().startswith(b"\x89PNG")
    report = json.loads(figures.read_text())
    assert report["command"].startswith("slimconv benchmark resnet14 --image-size 32")
    assert report["versions"]["jax"] == jax.__version__ and report["device"] in out
    assert [result["batch_size"] for result in report["results"]] == [1, 2]
    for result in report["results"]:
        assert f"{result['images_per_second']:.1f}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sc_resnet51"], "unknown model 'sc_resnet51'"),
        (["resnet14@2"], "resnet14 has no SlimConv"),
        (["sc_resnet14@1"], "k='1' is not a compression ratio"),
        (["resnet14", "--batch-size", "0"], "the batch size"),
        (["resnet14", "--repeats", "0"], "--repeats"),
        (["resnet14", "--chart", "chart.jpeg"], "it must end in .png, .svg, .pdf"),
        (["resnet14", "--json", "/nowhere/figures.json"], "cannot write /nowhere/figures.json"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, message, capsys, caching):
    assert main(["benchmark", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
