import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import ml_collections
import pytest

from slimconv_jax.__main__ import main
from slimconv_jax.benchmark import planning
from slimconv_jax.errors import InputError
from slimconv_jax.training.config import read_config

# ml_collections loads config files so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "there is no topology 'v9:2x2'; there are v5e:1"),
        ("v5e", "there is no topology 'v5e'"),
        ("h100:2x", "there is no topology 'h100:2x'"),
        ("v6e:2x2x2", "there is no topology v6e:2x2x2; there are v5e:1"),
        ("v5e:32x32", "there is no topology v5e:32x32; there are v5e:1"),
    ],
)
def test_unknown_topologies(topology, message, capsys):
    command = ["plan", "--config", str(ROOT / "configs/digits.py"), "--topology", topology]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_another_processor(monkeypatch):
    monkeypatch.setattr(planning.platform, "machine", lambda: "arm64")
    with pytest.raises(InputError, match="run on Linux with an x86-64 processor, and this is"):
        planning.get_devices("v5e:1")


@pytest.mark.parametrize(
    ("topology", "modules"),
    [("v5e:1", ["libtpu"]), ("h100:1", ["jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"])],
)
def test_a_missing_compiler(topology, modules, monkeypatch):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(InputError, match=r"pip install 'slimconv_jax\[plan\]'"):
        planning.get_devices(topology)


def test_where_nothing_can_be_written_nothing_is_compiled(tmp_path, capsys):
    command = ["plan", "--config", str(ROOT / "configs/digits.py"), "--topology", "v5e:1"]
    assert main([*command, "--json", str(tmp_path / "none/plan.json")]) == 1
    assert f"there is no directory {tmp_path}/none" in capsys.readouterr().err


def test_other_arguments_are_still_refused(capsys):
    with pytest.raises(SystemExit):
        main(["list", "--config.model.k=2"])
    assert "unrecognized arguments: --config.model.k=2" in capsys.readouterr().err


def test_what_helps_is_tried():
    config = ml_collections.ConfigDict(
        {"model": {"remat": False}, "step": {"accumulation_steps": 1}, "batch_size": 96}
    )
    tried = []

    def fits(changed):
        tried.append(changed)
        return changed.batch_size / changed.step.accumulation_steps <= 40

    found = dict(planning.find_fit(config, fits, 8))
    assert found == {
        "--config.model.remat=True": False,
        "--config.step.accumulation_steps=2": False,
        "--config.step.accumulation_steps=4": True,
        "--config.batch_size=48": False,
        "--config.batch_size=24": True,
        "--config.batch_size=32": True,
        "--config.batch_size=40": True,
    }
    assert tried[0].model.remat and not config.model.remat


def test_smaller_batches_divide_into_the_parts_that_the_run_has():
    config = ml_collections.ConfigDict(
        {"model": {"remat": True}, "step": {"accumulation_steps": 3}, "batch_size": 96}
    )

    def fits(changed):
        assert changed.batch_size % (8 * changed.step.accumulation_steps) == 0
        return changed.batch_size <= 48

    assert dict(planning.find_fit(config, fits, 8)) == {
        "--config.step.accumulation_steps=6": False,
        "--config.step.accumulation_steps=12": False,
        "--config.batch_size=48": True,
        "--config.batch_size=72": False,
    }


@pytest.mark.long
def test_multiply_adds_are_those_of_all_devices_together():
    config = read_config(ROOT / "configs/digits.py", [])
    counts = {
        len(devices): planning.lower_steps(config, devices, num_classes=10, image_shape=(8, 8, 3))
        for devices in (jax.devices()[:1], jax.devices()[:4])
    }
    for step in planning.STEPS:
        assert counts[1][step].macs == counts[4][step].macs > 1e6


def installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


CONFIG = "imagenet:sc_resnet50"
SMALL = ["--config.model.name=sc_resnet14", "--config.transform.image_size=64"]
BATCH = 24  # no number of channels


PLAN = """
import json, sys
import jax
from slimconv_jax.__main__ import main
compiled, compile = [], jax.stages.Lowered.compile
def record(lowered, **options):
    compiled.append(compile(lowered, **options))
    return compiled[-1]
jax.stages.Lowered.compile = record
report, step, *arguments = sys.argv[1:]
status = main(["plan", *arguments, f"--json={report}"])
memory = compiled[0].memory_analysis()
content = compiled[0].as_text(), memory.temp_size_in_bytes, memory.argument_size_in_bytes
open(step, "w").write(json.dumps(content))
sys.exit(status)
"""


def plan(tmp_path, topology):
    """Plans a small run, in a process of its own.

    Returns its JSON and its output; the text of the training step that it compiled; and the bytes
    of the step's temporaries and arguments, as the compiler reports them.
    """
    report, step = tmp_path / "plan.json", tmp_path / "step.json"
    arguments = [report, step, f"--config={CONFIG}", f"--topology={topology}"]
    arguments += [f"--config.batch_size={BATCH}", *SMALL]
    done = subprocess.run(
        [sys.executable, "-c", PLAN, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert not done.returncode, done.stderr
    return json.loads(report.read_text()), done.stdout, *json.loads(step.read_text())


def maps(text, dtype, batch):
    """The feature maps of more than 4x4 pixels, of a type, in the main program of a device."""
    entry = text[text.index("\nENTRY") :]
    shapes = re.findall(rf"\b{dtype}\[({batch}),(\d+),(\d+),(\d+)\]", entry)
    return [shape for shape in shapes if int(shape[1]) > 4]


needs_cuda = pytest.mark.skipif(
    not installed("jax_plugins.xla_cuda12") and not installed("jax_plugins.xla_cuda13"),
    reason="the compiler for GPUs is not installed: pip install -e '.[plan]'",
)
needs_libtpu = pytest.mark.skipif(
    not installed("libtpu"),
    reason="the compiler for TPUs is not installed: pip install -e '.[plan]'",
)


@pytest.mark.slow
@needs_cuda
def test_what_must_not_come_back_on_two_gpus(tmp_path):
    report, output, text, *_ = plan(tmp_path, "h100:2")
    step = report["steps"]["training"]
    assert step["fits"] and step["device_bytes"] == 84_942_979_072
    assert step["estimated_seconds"] is None
    assert step["bytes_seconds"] == step["bytes_accessed"] / 3350e9
    assert step["collectives"]["all-reduce"] > 10
    assert "2 x h100" in output and "not measured" in output and "DOES NOT FIT" not in output

    assert len(maps(text, "bf16", BATCH // 2)) > 100
    # No map is turned to channels first and back.
    entry = text[text.index("\nENTRY") :]
    turned = [line for line in entry.splitlines() if re.search(r"%\S*transpose\S* =", line)]
    assert turned  # kernels are turned
    assert not maps("\nENTRY" + "\n".join(turned), "bf16", BATCH // 2)


@pytest.mark.slow
@needs_libtpu
def test_what_must_not_come_back_on_four_tpus(tmp_path):
    report, output, text, temporary, arguments = plan(tmp_path, "v5e:2x2")
    step = report["steps"]["training"]
    assert (step["temporary_bytes"], step["argument_bytes"]) == (temporary, arguments)
    assert step["peak_bytes"] < 1.1 * arguments + temporary  # the state's memory is used again
    assert step["estimated_seconds"] > 0 and "by the compiler" in output
    assert not maps(text, "f32", BATCH // 4)
    assert len(maps(text, "bf16", BATCH // 4)) > 30
    assert list(step["collectives"]) == ["all-reduce"]
    # Two of each norm, one more of each gate's, and one of all gradients, in float32.
    sums = re.findall(r" = (.*?) all-reduce(?:-start)?\(", text)
    assert len(sums) == step["collectives"]["all-reduce"] <= 57
    assert not any("bf16" in types for types in sums)
    assert step["bytes_accessed"] < 0.27e9
