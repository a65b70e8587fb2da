import json
import os
import resource
import socket
import subprocess
import sys

import pytest
from etils import epath
from ml_collections import ConfigDict

from slimconv_jax.storage.checkpoints import list_checkpoints, verify_checksums
from slimconv_jax.storage.work_directory import claim_workdir, hold_workdir, read_recorded_config

CONFIG = ConfigDict({"seed": 0, "model": {"k": "4/3", "dilation": (True, False)}})


def test_a_directory_is_claimed_and_claimed_again(tmp_path):
    path = claim_workdir(tmp_path / "a" / "b", CONFIG, {})
    assert json.loads((path / "config.json").read_text()) == {
        "seed": 0,
        "model": {"k": "4/3", "dilation": [True, False]},
    }
    assert [entry.name for entry in path.iterdir()] == ["config.json"]
    assert claim_workdir(path, CONFIG, {}) == path


def test_another_experiment_is_refused_and_left_alone(tmp_path):
    claim_workdir(tmp_path, CONFIG, {})
    before = (tmp_path / "config.json").read_bytes()
    other = ConfigDict({"seed": 0, "model": {"k": "2", "dilation": (True, False)}, "more": 1})
    with pytest.raises(ValueError, match="another experiment") as error:
        claim_workdir(tmp_path, other, {})
    assert "config.model.k is '4/3' there and '2' here" in str(error.value)
    assert "config.more is 'absent' there and 1 here" in str(error.value)
    assert "config.seed" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_may_move_to_another_machine(tmp_path):
    first = ConfigDict({"dataset": {"data_dir": "/a"}, "loader": {"num_threads": 2}, "seed": 1})
    claim_workdir(tmp_path, first, {})
    moved = ConfigDict({"dataset": {"data_dir": "/b"}, "loader": {"num_threads": 8}, "seed": 1})
    claim_workdir(tmp_path, moved, {})
    assert json.loads((tmp_path / "config.json").read_text()) == moved.to_dict()


@pytest.mark.parametrize("name", ["checkpoints", "model.json"])
def test_checkpoints_and_models_without_a_config_are_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"holds {name} but no config\.json"):
        claim_workdir(tmp_path, CONFIG, {})


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_a_damaged_config_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"another experiment: .*config\.json is (not a c|damaged: it)"
    ):
        claim_workdir(tmp_path, CONFIG, {})
    with pytest.raises(ValueError, match=r"config\.json is damaged: it is not "):
        read_recorded_config(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to(path)])
def test_a_config_that_is_no_file_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"another experiment: cannot read .*/config\.json: \w"):
        claim_workdir(tmp_path, CONFIG, {})
    with pytest.raises(ValueError, match=r"^cannot read .*/config\.json: \w"):
        read_recorded_config(tmp_path)


def test_checkpoints_that_cannot_be_listed_are_not_missing(tmp_path):
    assert list_checkpoints(epath.Path(tmp_path)) == []
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ValueError, match=r"^cannot read .*/checkpoints: Not a directory"):
        list_checkpoints(epath.Path(tmp_path))
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    with pytest.raises(ValueError, match=r"^cannot read .*/checkpoints: Too many levels of symb"):
        list_checkpoints(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file .*/checksums.json"),
        ("[]", "checksums.json is damaged: it has no checksums"),
        ("{", "checksums.json is damaged: it is not JSON"),
        ('{"../secret": "0"}', r"lists '\.\./secret', which is not the name of a file in it"),
        ('{"/dev/zero": "0"}', "lists '/dev/zero', which is not the name of a file in it"),
        ('{"a\\u0000": "0"}', r"lists 'a\\x00', which is not the name of a file in it"),
        ('{"model/zero": "0"}', "cannot read .*/model/zero: It is a pipe or a device"),
        ('{"model/pipe": "0"}', "cannot read .*/model/pipe: It is a pipe or a device"),
        ('{"model/none": "0"}', "cannot read .*/model/none: No such file"),
        ('{"model": "0"}', "cannot read .*/model: Is a directory"),
        ("{}", "/model/pipe has no checksum, so it is not read"),
    ],
)
def test_checksums_of_a_stranger(tmp_path, content, message):
    (tmp_path / "secret").write_text("")
    checkpoint = epath.Path(tmp_path / "5")
    (tmp_path / "5" / "model").mkdir(parents=True)
    (tmp_path / "5" / "model" / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "5" / "model" / "pipe")
    if content is not None:
        (tmp_path / "5" / "checksums.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        verify_checksums(checkpoint)


def test_an_unwritable_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to the work directory .*file/run"):
        claim_workdir(tmp_path / "file" / "run", CONFIG, {})


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


@pytest.mark.process
def test_a_run_that_was_killed_locks_nothing(tmp_path):
    holds = f"""
import time
from etils import epath
from slimconv_jax.storage.work_directory import hold_workdir
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


def test_a_full_disk_is_a_sentence(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with (
            pytest.raises(
                ValueError, match=f"cannot write to the work directory {tmp_path}: .* large"
            ),
            hold_workdir(epath.Path(tmp_path)),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("kept")])
def test_what_is_no_lock_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / ".lock")
    with (
        pytest.raises(ValueError, match=f"cannot write to the work directory {tmp_path}: "),
        hold_workdir(epath.Path(tmp_path)),
    ):
        pass
    assert not (tmp_path / "kept").exists()


def test_a_claimed_directory_that_became_unwritable_is_refused(tmp_path):
    claim_workdir(tmp_path, CONFIG, {})
    (tmp_path / "config.json.part" / "in").mkdir(parents=True)  # in the way even of root
    with pytest.raises(ValueError, match="cannot write to the work directory"):
        claim_workdir(tmp_path, CONFIG, {})
