"""The work directory: which run it belongs to, and its checkpoints."""

import json

import jax
import ml_collections
import orbax.checkpoint as ocp
from etils import epath

from slimconv_jax.errors import InputError
from slimconv_jax.training.step import TrainState

NOT_COMPARED = (
    "checkpoints_to_keep",
    "dataset.data_dir",
    "eval_batch_size",
    "loader.num_threads",
    "loader.on_error",
)
"""The keys that may change when a run continues, since what is learnt does not depend on them."""


def claim_workdir(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> epath.Path:
    """Creates a work directory for a config, or makes sure that it belongs to that config.

    Args:
      workdir: a directory; it is created, with its parents, if it is not there.
      config: written to `config.json` there, and compared with what is there already; only
        the keys in `NOT_COMPARED` may have changed.

    Raises:
      ValueError: if the directory cannot be written, or belongs to another experiment.
    """
    path = epath.Path(workdir).expanduser().absolute()
    text = config.to_json_best_effort(indent=2, sort_keys=True) + "\n"
    file = path / "config.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            for name in ("checkpoints", "model.json"):
                if (path / name).exists():
                    raise InputError(
                        f"{path} holds {name} but no config.json that says of which experiment; "
                        "choose another --workdir"
                    )
        # Written in any case, to learn whether that is possible, and under another name
        # first, so that config.json is never there in part.
        part = path / "config.json.part"
        part.write_text(text)
        if file.exists() and (differences := _differences(file.read_bytes(), text)):
            part.unlink()
            raise InputError(
                f"{path} holds another experiment: {differences}; choose another --workdir, or "
                "delete this one"
            )
        part.replace(file)
    except OSError as error:
        raise InputError(f"cannot write to the work directory {path}: {error}") from None
    return path


def _differences(there: bytes, here: str) -> str:
    """Which keys of two configs, as JSON texts, differ; empty if none do."""
    try:
        old, new = _flatten(json.loads(there)), _flatten(json.loads(here))
    except (ValueError, AttributeError):
        return "its config.json cannot be read as a config"
    return ", ".join(
        f"config.{key} is {old.get(key, 'absent')!r} there and {new.get(key, 'absent')!r} here"
        for key in sorted(old | new)
        if key not in NOT_COMPARED and old.get(key, "absent") != new.get(key, "absent")
    )


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def checkpoint_manager(workdir: epath.Path, *, to_keep: int) -> ocp.CheckpointManager:
    """The checkpoints of a work directory; saving goes on in the background."""
    options = ocp.CheckpointManagerOptions(max_to_keep=to_keep)
    return ocp.CheckpointManager(workdir / "checkpoints", options=options)


def save(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    """Begins to save a state; it may be donated as soon as this returns.

    The model is an item of its own, so that `load_model` needs to know nothing of optimisers.
    """
    items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
    manager.save(step, args=ocp.args.Composite(**items))


def _items(state: TrainState) -> dict[str, dict]:
    return {
        "model": {"params": state.params, "batch_stats": state.batch_stats},
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }


def restore(
    manager: ocp.CheckpointManager,
    step: int,
    *,
    like: TrainState,
    sharding: jax.sharding.Sharding,
) -> TrainState:
    """The state saved at a step, with the shapes of another one, which may be abstract."""
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like
    )
    items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract).items()}
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    return TrainState(**restored["model"], **restored["optimizer"])
