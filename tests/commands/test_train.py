"""The command line of train.py, each time in a process of its own."""

import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from image_files import encode, smooth, write_tfds
from processes import own_errors

from slimconv_jax import devices
from slimconv_jax.__main__ import main

ROOT = Path(__file__).parents[2]

FAST = "--xla_backend_optimization_level=0"  # compiles in half the time


def run(*arguments, cwd=ROOT, **environment):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    env = os.environ | {"XLA_FLAGS": FAST} | environment
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # to see where it is by default
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


def start(*arguments):
    """A run in the background, whose output can be read line by line."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    env = os.environ | {"XLA_FLAGS": FAST}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env
    )


def checkpoint(workdir, step):
    """The model and optimiser of a checkpoint, as NumPy arrays."""
    items = [
        ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / item)
        for item in ("model", "optimizer")
    ]
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(items)}


def assert_equal(a, b):
    assert a.keys() == b.keys() and len(a) > 100
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


CONFIG = f"--config={ROOT / 'configs' / 'digits.py'}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --config"),
        (["--config=configs/nope.py"], "/configs/nope.py is not there; those that come with"),
        (
            [CONFIG, "--config.batch_sise=3"],
            "error: config has no key 'batch_sise' (did you mean 'batch_size'?)",
        ),
        ([CONFIG, "--config.model.kk", "3"], "error: config.model has no key 'kk'"),
        (
            [CONFIG, "--config.augment.mixup_alfa=0.2"],
            "has no key 'mixup_alfa' (did you mean 'mixup_alpha'?)",
        ),
        ([CONFIG, "--config.seed.x=3"], "error: config.seed is a value"),
        ([CONFIG, "--config.augment.crop_padding=-1", "--workdir", "config.x"], "crop_padding=-1"),
        (
            [CONFIG, "--config.num_epochs=None"],
            "error: the config lacks config.num_epochs; --help-config lists all keys",
        ),
        ([f"--config={ROOT}/README.md"], f"error: the config file {ROOT}/README.md cannot be used"),
        ([f"--config={ROOT}"], f"error: the config {ROOT} is a directory, not a config file"),
        ([CONFIG, "--config.batch_size=x"], "invalid literal for int()"),
        ([CONFIG, "--config.model.name=sc_resnet41"], "error: unknown model 'sc_resnet41'"),
        ([CONFIG, "--flagfile=nowhere"], "error: the file of --flagfile cannot be read"),
        ([CONFIG, "more"], "error: unknown argument 'more'; "),
        ([CONFIG, "--workdri=x"], "error: unknown argument '--workdri=x'; --config.KEY=VALUE"),
        ([CONFIG, "--num_processes=2"], "and --process_id give all three, or none"),
    ],
)
def test_bad_input_is_a_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    try:
        status = main(["train", *arguments])
    except SystemExit as error:  # of argparse
        status = error.code
    said = capsys.readouterr()
    assert status in (1, 2) and said.out == ""
    assert message in said.err and "Traceback" not in said.err
    assert said.err.count("\n") == 1 or status == 2
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_keys_of_the_config(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main(["train", "--config", "digits", "--config.model.k=8/3", "--help-config"]) == 0
    said = capsys.readouterr().out
    assert (
        "config.model.k = '8/3'  (default: None)\n    compression ratio of every SlimConv" in said
    )


@pytest.mark.process
def test_an_indivisible_batch_and_foreign_or_unwritable_directories(tmp_path):
    done = run(CONFIG, "--config.batch_size=100", XLA_FLAGS=os.environ["XLA_FLAGS"])
    assert done.returncode == 1
    assert "batch_size=100 does not divide over 8 devices" in done.stderr

    (tmp_path / "config.json").write_text(json.dumps({"seed": 1}))
    done = run(CONFIG, "--workdir", tmp_path)
    assert done.returncode == 1
    assert "holds another experiment: " in done.stderr
    assert "config.seed is 1 there and 0 here" in done.stderr
    assert own_errors(done.stderr).count("\n") == 1

    (tmp_path / "file").write_text("")
    done = run(CONFIG, "--workdir", tmp_path / "file" / "run")
    assert done.returncode == 1
    assert own_errors(done.stderr).startswith("error: cannot write to the work directory")
    assert own_errors(done.stderr).count("\n") == 1


@pytest.mark.process
def test_a_run_from_the_command_line(tmp_path):
    settings = ("--config.num_epochs=1", "--config.model.width=8", "--config.model.k=2")
    cache = tmp_path / "cache"
    done = run(CONFIG, *settings, cwd=tmp_path, XDG_CACHE_HOME=str(cache))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "of 360 images" in done.stdout.splitlines()[-4]
    workdir = tmp_path / "runs" / "digits"
    assert json.loads((workdir / "config.json").read_text())["model"]["k"] == "2"
    assert len(list((cache / "slimconv_jax").iterdir())) > 10  # compiled programs

    done = run(CONFIG, *settings, cwd=tmp_path, XDG_CACHE_HOME=str(cache))
    assert done.returncode == 0
    assert "is complete, nothing to do" in done.stdout


@pytest.mark.process
def test_training_on_a_tfds_data_set_imports_no_tensorflow(tmp_path):
    examples = [(encode(smooth(32, 32, seed=i)), i % 3) for i in range(20)]
    write_tfds(tmp_path, {"train": examples, "test": examples[:5]})
    code = (
        "import sys\n"
        "from slimconv_jax.training.config import read_config\n"
        "from slimconv_jax.training.loop import train\n"
        "config = read_config('cifar100_small')\n"
        "config.model.update(name='resnet14', k=None, width=4)\n"
        f"config.dataset.update(name='tfds/animals', data_dir={str(tmp_path)!r})\n"
        "config.batch_size, config.num_epochs = 16, 1\n"
        f"train(config, {str(tmp_path / 'run')!r})\n"
        "assert 'tensorflow_datasets' in sys.modules\n"
        "assert not {'tensorflow', 'torch'} & sys.modules.keys()\n"
    )
    env = os.environ | {"XLA_FLAGS": FAST, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "20 training images kept on the devices, 5 test images, 3 classes" in done.stdout
    assert "of 5 images" in done.stdout.splitlines()[-4]


@pytest.mark.process
def test_a_start_imports_nothing_that_it_does_not_need():
    code = (
        "import sys\n"
        "import slimconv_jax.training.loop\n"
        "from slimconv_jax.training.config import read_config\n"
        "from slimconv_jax.data.datasets import load_splits\n"
        "load_splits(**read_config('digits').dataset)\n"
        "heavy = {'torch', 'tensorflow', 'tensorflow_datasets', 'matplotlib', 'sklearn'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


# Without SlimConv, which takes long to compile.
SMALL = (
    *(CONFIG, "--config.num_epochs=4", "--config.eval_every_epochs=1"),
    *("--config.model.name=resnet14", "--config.model.k=None", "--config.model.width=8"),
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = start(*SMALL, "--workdir", workdir)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return workdir


@pytest.mark.process
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_next_start_continues(tmp_path, uninterrupted, number):
    process = start(*SMALL, "--workdir", tmp_path)
    lines = list(itertools.takewhile(lambda line: "test  " not in line, process.stdout))
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    name, status = {
        signal.SIGTERM: ("SIGTERM", 143),
        signal.SIGHUP: ("SIGHUP", 129),
        signal.SIGINT: ("Ctrl-C", 130),
    }[number]
    assert process.returncode == status, (lines, output)
    last = output.splitlines()[-1]
    step = re.fullmatch(f"stopped by {name}; step (.*) is saved, the same command continues", last)[
        1
    ]
    assert 22 <= int(step) < 90
    assert (tmp_path / "checkpoints" / step).is_dir()
    process = start(*SMALL, "--workdir", tmp_path)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert f"continuing {tmp_path} after step {step}; " in output
    assert_equal(checkpoint(tmp_path, 90), checkpoint(uninterrupted, 90))
    # The same metrics, but for one more line of the steps before the stop.
    lines, expected = (
        {
            (line["step"], line["split"]): line["loss"]
            for line in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        }
        for path in (tmp_path, uninterrupted)
    )
    assert lines.keys() == expected.keys() | {(int(step), "train")}
    changed = {key for key in expected if lines[key] != expected[key]}
    assert changed <= {min(key for key in expected if key[1] == "train" and key[0] >= int(step))}


@pytest.mark.process
@pytest.mark.parametrize("seconds", [1.5, 2.5, 3.5])
def test_ctrl_c_while_a_run_starts(tmp_path, seconds):
    process = start(*SMALL, "--workdir", tmp_path / "run")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "Traceback" not in output and "Exception ignored" not in output
    assert re.search(r"^(interrupted; nothing was saved|stopped by Ctrl-C; .*)$", output, re.M)


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_same_bits(tmp_path, uninterrupted):
    rng = random.Random(0)
    for _ in range(10):
        process = start(*SMALL, "--workdir", tmp_path)
        for line in process.stdout:
            if line.startswith("start "):
                break
        time.sleep(rng.uniform(0, 12))
        process.kill()
        process.communicate()
    process = start(*SMALL, "--workdir", tmp_path)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert_equal(checkpoint(tmp_path, 90), checkpoint(uninterrupted, 90))


@pytest.mark.process
def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path):
    # Larger files than so many blocks cannot be written, as on a full disk.
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, f"--workdir={tmp_path / 'run'}"]
    limited = f"ulimit -f 120; exec {shlex.join(command)}"
    env = os.environ | {"XLA_FLAGS": FAST, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        ["bash", "-c", limited], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 1
    assert "cannot write the checkpoint of step 22 in" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr + done.stdout
