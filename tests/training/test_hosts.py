"""Several real processes on 127.0.0.1."""

import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from slimconv_jax.training import hosts
from slimconv_jax.training.hosts import initialize, is_lost_contact, on_first

ROOT = Path(__file__).parents[2]


def start(count, index, command, *, devices, **environment):
    """One of several processes, each with so many devices."""
    env = os.environ | environment
    # Compiles in half the time.
    fast = "--xla_backend_optimization_level=0"
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {fast}"
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        cwd=ROOT,
    )


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


STEPS = """
import functools, itertools, sys
import jax, numpy as np, optax
from flax import nnx
from slimconv_jax.training.hosts import initialize
address, count, index, output, name = sys.argv[1:]
if int(count) > 1:
    initialize(address, int(count), int(index))
jax.config.update("jax_enable_x64", True)
from randomize import randomized
from slimconv_jax.data.loader import load_dataset
from slimconv_jax.data.sources import digits
from slimconv_jax.data.transforms import Transform
from slimconv_jax.models.layers import ConvBN
from slimconv_jax.models.slimconv import SlimConv
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.training.augment import augment
from slimconv_jax.training.step import create_state, make_train_step
from slimconv_jax.devices import batch_sharded, data_mesh, replicated

mesh = data_mesh()
dataset = load_dataset(
    digits("train"), Transform(), training=True, sharding=batch_sharded(mesh), on_device=False
)

class Small(nnx.Module):
    def __init__(self, rngs):
        self.stem = ConvBN(3, 32, 3, strides=2, rngs=rngs)
        self.unit = SlimConv(32, strides=2, rngs=rngs)
        self.classifier = nnx.Linear(self.unit.out_features, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.unit(nnx.relu(self.stem(x))))
        return self.classifier(x.mean(axis=(1, 2)))

def build():
    if name == "small":
        return Small(nnx.Rngs(0))
    return abstract_model(name, width=8, num_classes=10)

model = randomized(build, np.float64)
optimizer = optax.sgd(0.02, momentum=0.9)
step = make_train_step(
    model, optimizer, lambda step: 0.02, num_classes=10,
    augment=functools.partial(augment, crop_padding=2, mixup_alpha=0.2, cutmix_alpha=1.0),
    normalize=lambda images: images / 255.0, key=jax.random.key(1), mesh=mesh, ema_decay=0.9,
)
state = jax.device_put(create_state(model, optimizer, ema=True), replicated(mesh))
for batch in itertools.islice(dataset.train_batches(32, seed=0, first_step=0), 20):
    state, metrics = step(state, batch)
if jax.process_index() == 0:
    leaves = jax.tree.leaves((state.params, state.batch_stats, state.ema))
    np.savez(output, *map(np.asarray, leaves), loss=metrics["loss"])
"""


@pytest.mark.process
@pytest.mark.parametrize("model", ["small", pytest.param("sc_resnet14", marks=pytest.mark.slow)])
def test_the_layout_does_not_change_the_numbers(tmp_path, model):
    # In float64, so that rounding cannot hide a difference in what is computed: real batches,
    # mixing, 20 steps, and then parameters, statistics and averages.
    layouts = {"one": (1, 1), "eight": (1, 8), "two_by_two": (2, 2)}
    results = {}
    for name, (count, devices) in layouts.items():
        file = tmp_path / f"{name}.npz"
        address = free_address()
        processes = [
            start(count, i, ["-c", STEPS, address, count, i, file, model], devices=devices)
            for i in range(count)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert all(process.returncode == 0 for process in processes), outputs
        results[name] = np.load(file)
    for name in ("eight", "two_by_two"):
        for key, expected in results["one"].items():
            difference = np.linalg.norm(results[name][key] - expected)
            assert difference <= 1e-9 * np.linalg.norm(expected), (name, key)


# Without SlimConv, which takes long to compile.
SETTINGS = (
    *("--config.num_epochs=20", "--config.eval_every_epochs=1", "--config.model.width=8"),
    *("--config.model.name=resnet14", "--config.model.k=None"),
)


def start_training(workdir, *settings, slurm=False, second=()):
    """Two processes of train.py, on the digits, with two devices each, one with settings more."""
    address = free_address()
    for index in range(2):
        arguments = ["train.py", "--config=configs/digits.py", f"--workdir={workdir}", *SETTINGS]
        environment = {}
        if slurm:  # what srun sets; the port comes from the number of the job
            environment = {
                "SLURM_JOB_ID": str(int(address.split(":")[1]) % 4096),
                "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
            }
        else:
            arguments += [f"--coordinator_address={address}", "--num_processes=2"]
            arguments.append(f"--process_id={index}")
        of_its_own = second if index else ()
        yield start(2, index, [*arguments, *settings, *of_its_own], devices=2, **environment)


def read_until(process, text):
    lines = list(itertools.takewhile(lambda line: text not in line, process.stdout))
    assert process.poll() is None, lines


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*[0-9]"))


@pytest.mark.process
def test_two_processes_stop_together_and_continue(tmp_path):
    # Started by SLURM; one is told to stop, and both save the same step.
    workdir = tmp_path / "run"
    first, second = start_training(workdir, slurm=True)
    read_until(first, "train  ")
    second.send_signal(signal.SIGINT)
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [143, 130], outputs
    step = checkpoints(workdir)[-1]
    for name, output in zip(("SIGTERM", "Ctrl-C"), outputs, strict=True):
        assert f"stopped by {name}; step {step} is saved, the same command continues" in output
    assert "devices  " not in outputs[1]  # the first process alone reports

    # The run continues. Told to stop before its first step, it does that one.
    first, second = start_training(workdir)
    read_until(first, f"continuing {workdir} after step {step}")
    first.send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (143, 143), outputs
    (step,) = {output.split("stopped by SIGTERM; step ")[1].split()[0] for output in outputs}
    assert step == str(checkpoints(workdir)[-1])

    # What the first process refuses, the others leave too.
    refused = list(start_training(workdir, "--config.seed=3"))
    outputs = [process.communicate(timeout=120)[0] for process in refused]
    assert [process.returncode for process in refused] == [1, 1], outputs
    assert "another experiment: config.seed is 0 there and 3 here" in outputs[0]
    assert "stopped, since the first process cannot go on; it says why" in outputs[1]


@pytest.mark.process
def test_what_one_process_refuses_the_others_learn(tmp_path):
    second = ["--config.batch_size=6"]
    processes = list(start_training(tmp_path / "run", second=second))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    reason = "config.batch_size=6 does not divide over 4 devices; it must be a multiple of 4\n"
    assert outputs[0].endswith(f"error: process 1 cannot go on: {reason}")
    assert outputs[1].endswith(f"error: {reason}")


@pytest.mark.process
def test_processes_that_differ_do_not_train(tmp_path):
    second = ["--config.optimizer.learning_rate=0.0501"]
    processes = list(start_training(tmp_path / "run", second=second))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    for output in outputs:
        (sentence,) = (line for line in output.splitlines() if line.startswith("error: "))
        assert sentence == (
            "error: the processes of this run do not do the same: config.optimizer.learning_rate "
            "is 0.1 in process 0 and 0.0501 in process 1"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_lost_process_ends_the_other_in_bounded_time_with_a_sentence(tmp_path):
    first, second = start_training(tmp_path)
    read_until(first, "test  ")
    read_until(first, "train  ")
    second.kill()
    output = first.communicate(timeout=150)[0]
    second.communicate()
    assert first.returncode == 1
    assert "error: " in output and "Traceback" not in output
    assert checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", 2, None), "give all three, or none"),
        (("127.0.0.1", 2, 0), "--coordinator_address=127.0.0.1 must be HOST:PORT"),
        (("127.0.0.1:1", 0, 0), "--num_processes=0 must be an integer >= 1"),
        (("127.0.0.1:1", 2, 0, 0), "--initialization_timeout=0 must be an integer >= 1"),
        (("127.0.0.1:1", 2, 2), "--process_id=2 must be from 0 to 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        initialize(*arguments)


def test_alone_nothing_is_connected(monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)  # no TPU's library
    initialize()
    assert not jax.distributed.is_initialized()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")
    initialize()
    assert not jax.distributed.is_initialized()
    assert on_first(lambda: 7) == 7
    assert not is_lost_contact(ValueError("Gloo all-reduce failed"))
