import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from slimconv_jax.training.checkpoint import checkpoint_manager, claim_workdir, restore, save
from slimconv_jax.training.step import TrainState, data_mesh, replicated

CONFIG = ConfigDict({"seed": 0, "model": {"k": "4/3", "dilation": (True, False)}})


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


def test_a_claimed_directory_that_became_unwritable_is_refused(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    (tmp_path / "config.json.part").mkdir()  # stands in the way even of root
    with pytest.raises(ValueError, match="cannot write to the work directory"):
        claim_workdir(tmp_path, CONFIG)


def test_a_state_comes_back_as_it_was(tmp_path):
    sharding = replicated(data_mesh())
    state = TrainState(
        jnp.int32(3),
        {"stages": {0: {"kernel": jnp.arange(6.0).reshape(2, 3)}}},
        {"mean": jnp.array([0.1, 1e-30])},
        ({"trace": jnp.ones(2, jnp.bfloat16)}, ()),
    )
    state = jax.device_put(state, sharding)
    with contextlib.closing(checkpoint_manager(tmp_path, to_keep=2)) as manager:
        for step in (1, 2, 3):
            save(manager, step, state)
    with contextlib.closing(checkpoint_manager(tmp_path, to_keep=2)) as manager:
        assert sorted(manager.all_steps()) == [2, 3]
        like = jax.eval_shape(lambda: state)
        restored = restore(manager, 3, like=like, sharding=sharding)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(a, b)
