import gc
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from slimconv_jax.devices import data_mesh, replicated
from slimconv_jax.storage.checkpoints import list_checkpoints, newest_intact
from slimconv_jax.training.checkpoint import Checkpoints
from slimconv_jax.training.step import TrainState

# After a failure Orbax leaves event loops that complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def freeze():
    gc.freeze()  # what the tests before have left need not be gone through


@pytest.fixture(autouse=True)
def collect():
    yield
    gc.collect()


def make_state(ema=False):
    params = {"stages": {0: {"kernel": jnp.arange(6.0).reshape(2, 3)}}}
    batch_stats = {"mean": jnp.array([0.1, 1e-30])}
    variables = {"params": params, "batch_stats": batch_stats}
    state = TrainState(
        jnp.int32(3),
        variables,
        ({"trace": jnp.ones(2, jnp.bfloat16)}, ()),
        jax.tree.map(lambda x: x + 1, variables) if ema else None,
    )
    return jax.device_put(state, replicated(data_mesh()))


def changed(**collections):
    state = make_state()
    return state._replace(variables=state.variables | collections)


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


def test_a_checkpoint_with_more_than_was_written_is_damaged(tmp_path, capsys):
    save_steps(tmp_path, 5, 50)
    (tmp_path / "checkpoints" / "50" / "model" / "more").write_text("")
    assert newest_intact(epath.Path(tmp_path)) == 5
    assert "50/model/more has no checksum, so it is not read" in capsys.readouterr().out


def test_other_names_among_the_checkpoints_are_left_alone(tmp_path):
    save_steps(tmp_path, 5)
    for name in ("\u00b2", "\u0661", "5.tmp", "-1", "1e3", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert newest_intact(epath.Path(tmp_path)) == 5
    save_steps(tmp_path, 10)
    assert steps_in(tmp_path) == [5, 10]


def test_what_orbax_takes_for_a_later_checkpoint_does_not_prevent_saving(tmp_path):
    save_steps(tmp_path, 5)
    late = "9" * 200
    (tmp_path / "checkpoints" / late).mkdir()
    with pytest.raises(
        ValueError, match=r"cannot write the checkpoint of step 10 in .*one of step 99"
    ):
        save_steps(tmp_path, 10)
    assert newest_intact(epath.Path(tmp_path)) == 5
    assert (tmp_path / f"damaged-checkpoint-{late}").is_dir()
    save_steps(tmp_path, 10)
    assert steps_in(tmp_path) == [5, 10]


def test_if_all_are_damaged_nothing_is_touched(tmp_path):
    save_steps(tmp_path, 5, 50)
    for step in (5, 50):
        flip(tmp_path / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used: .*50/.*; .*5/.*anew"):
        newest_intact(epath.Path(tmp_path))
    assert steps_in(tmp_path) == [5, 50]


def test_a_state_of_something_else_is_refused(tmp_path):
    save_steps(tmp_path, 5)
    other = changed(batch_stats={"mean": jnp.zeros(3)})
    for like in (other, make_state(ema=True)):
        with (
            Checkpoints(epath.Path(tmp_path), to_keep=2) as checkpoints,
            pytest.raises(ValueError, match=r"cannot read the checkpoint of step 5, or it is of"),
        ):
            checkpoints.restore(5, like=like, sharding=replicated(data_mesh()))


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path):
    # Files of more than 4 MB cannot be written, which is how a full disk looks from here.
    big = changed(params={"kernel": jnp.arange(4e6)})
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
