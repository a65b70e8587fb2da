import gc
import json
import os
import resource
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from slimconv_jax.saving import list_checkpoints
from slimconv_jax.training.checkpoint import (
    Checkpoints,
    claim_workdir,
    hold_workdir,
    newest_intact,
)
from slimconv_jax.training.step import EMA, TrainState, data_mesh, replicated

CONFIG = ConfigDict({"seed": 0, "model": {"k": "4/3", "dilation": (True, False)}})


# After a failure Orbax leaves event loops that complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect():
    yield
    gc.collect()


def test_a_directory_is_claimed_and_claimed_again(tmp_path):
    path = claim_workdir(tmp_path / "a" / "b", CONFIG)
    assert json.loads((path / "config.json").read_text()) == {
        "seed": 0,
        "model": {"k": "4/3", "dilation": [True, False]},
    }
    assert [entry.name for entry in path.iterdir()] == ["config.json"]
    assert claim_workdir(path, CONFIG) == path


def test_another_experiment_is_refused_and_left_alone(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()
    other = ConfigDict({"seed": 0, "model": {"k": "2", "dilation": (True, False)}, "more": 1})
    with pytest.raises(ValueError, match="another experiment") as error:
        claim_workdir(tmp_path, other)
    assert "config.model.k is '4/3' there and '2' here" in str(error.value)
    assert "config.more is 'absent' there and 1 here" in str(error.value)
    assert "config.seed" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_may_move_to_another_machine(tmp_path):
    first = ConfigDict({"dataset": {"data_dir": "/a"}, "loader": {"num_threads": 2}, "seed": 1})
    claim_workdir(tmp_path, first)
    moved = ConfigDict({"dataset": {"data_dir": "/b"}, "loader": {"num_threads": 8}, "seed": 1})
    claim_workdir(tmp_path, moved)
    assert json.loads((tmp_path / "config.json").read_text()) == moved.to_dict()


@pytest.mark.parametrize("name", ["checkpoints", "model.json"])
def test_checkpoints_and_models_without_a_config_are_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"holds {name} but no config\.json"):
        claim_workdir(tmp_path, CONFIG)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_an_unreadable_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"its config\.json cannot be read"):
        claim_workdir(tmp_path, CONFIG)


def test_an_unwritable_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to the work directory .*file/run"):
        claim_workdir(tmp_path / "file" / "run", CONFIG)


def test_a_work_directory_has_one_run_at_a_time(tmp_path):
    workdir = epath.Path(tmp_path / "a" / "run")
    for _ in range(2):  # one after the other
        with hold_workdir(workdir):
            with pytest.raises(ValueError) as error, hold_workdir(workdir):
                pass
            assert (
                f"{workdir} is in use by process {os.getpid()} on {socket.gethostname()}, since "
                in (str(error.value))
            )
    assert (workdir / ".lock").read_text().count("\n") == 1


def test_a_run_that_was_killed_locks_nothing(tmp_path):
    holds = f"""
import time
from etils import epath
from slimconv_jax.training.checkpoint import hold_workdir
with hold_workdir(epath.Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", holds], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(ValueError, match=f"in use by process {process.pid} on"),
            hold_workdir(epath.Path(tmp_path)),
        ):
            pass
        process.kill()
    with hold_workdir(epath.Path(tmp_path)):
        pass


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_lock_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / ".lock")
    with (
        pytest.raises(ValueError, match=f"cannot write to the work directory {tmp_path}: "),
        hold_workdir(epath.Path(tmp_path)),
    ):
        pass


def test_a_claimed_directory_that_became_unwritable_is_refused(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    (tmp_path / "config.json.part").mkdir()  # stands in the way even of root
    with pytest.raises(ValueError, match="cannot write to the work directory"):
        claim_workdir(tmp_path, CONFIG)


def make_state(ema=False):
    params = {"stages": {0: {"kernel": jnp.arange(6.0).reshape(2, 3)}}}
    batch_stats = {"mean": jnp.array([0.1, 1e-30])}
    state = TrainState(
        jnp.int32(3),
        params,
        batch_stats,
        ({"trace": jnp.ones(2, jnp.bfloat16)}, ()),
        jax.tree.map(lambda x: x + 1, EMA(params, batch_stats)) if ema else None,
    )
    return jax.device_put(state, replicated(data_mesh()))


def save_steps(workdir, *steps, to_keep=2, best=(), state=None):
    with Checkpoints(epath.Path(workdir), to_keep=to_keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state() if state is None else state, best=best)


def steps_in(workdir):
    return [int(path.name) for path in list_checkpoints(epath.Path(workdir))]


@pytest.mark.parametrize("ema", [False, True])
def test_a_state_comes_back_as_it_was(tmp_path, ema):
    state = make_state(ema)
    save_steps(tmp_path, 1, 2, 3, state=state)
    assert steps_in(tmp_path) == [2, 3]
    assert newest_intact(epath.Path(tmp_path)) == 3
    with Checkpoints(epath.Path(tmp_path), to_keep=2) as checkpoints:
        like = jax.eval_shape(lambda: state)
        restored = checkpoints.restore(3, like=like, sharding=replicated(data_mesh()))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(a, b)


def test_the_newest_and_the_best_are_kept(tmp_path):
    save_steps(tmp_path, 4, 8, 12, 16, 20, best=[7, 8, 4])  # there is none of step 7
    assert steps_in(tmp_path) == [8, 16, 20]


def test_no_checkpoint_yet(tmp_path):
    assert newest_intact(epath.Path(tmp_path)) == 0


def biggest_file(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(directory):
    file = biggest_file(directory / "model")
    file.write_bytes(file.read_bytes()[:-1])


def flip(directory):
    file = biggest_file(directory / "optimizer")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated": truncate,
    "flipped": flip,
    "lost": lambda directory: biggest_file(directory / "model").unlink(),
    "unsealed": lambda directory: (directory / "checksums.json").unlink(),
    "nonsense": lambda directory: (directory / "checksums.json").write_text("[1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_makes_way_for_the_one_before(tmp_path, capsys, damage):
    save_steps(tmp_path, 5, 50)
    DAMAGES[damage](tmp_path / "checkpoints" / "50")
    assert newest_intact(epath.Path(tmp_path)) == 5
    printed = capsys.readouterr().out
    assert printed.startswith("warning: ") and "damaged" in printed
    assert steps_in(tmp_path) == [5]
    assert (tmp_path / "damaged-checkpoint-50" / "model").is_dir()
    save_steps(tmp_path, 50)  # its place is free
    DAMAGES[damage](tmp_path / "checkpoints" / "50")
    assert newest_intact(epath.Path(tmp_path)) == 5


def test_if_all_are_damaged_nothing_is_touched(tmp_path):
    save_steps(tmp_path, 5, 50)
    for step in (5, 50):
        flip(tmp_path / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used: .*50/.*; .*5/.*anew"):
        newest_intact(epath.Path(tmp_path))
    assert steps_in(tmp_path) == [5, 50]


def test_a_state_of_something_else_is_refused(tmp_path):
    save_steps(tmp_path, 5)
    other = make_state()._replace(batch_stats={"mean": jnp.zeros(3)})
    for like in (other, make_state(ema=True)):
        with (
            Checkpoints(epath.Path(tmp_path), to_keep=2) as checkpoints,
            pytest.raises(ValueError, match=r"cannot read the checkpoint of step 5, or it is of"),
        ):
            checkpoints.restore(5, like=like, sharding=replicated(data_mesh()))


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path):
    # Files of more than 4 MB cannot be written, which is how a full disk looks from here.
    big = make_state()._replace(params={"kernel": jnp.arange(4e6)})
    save_steps(tmp_path, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
    try:
        with pytest.raises(ValueError, match="cannot write the checkpoint of step 10 in"):
            save_steps(tmp_path, 10, state=big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_intact(epath.Path(tmp_path)) == 5
    save_steps(tmp_path, 10, state=big)
    assert steps_in(tmp_path) == [5, 10]
