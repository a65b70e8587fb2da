"""One training step: a pure function from state and batch to state and metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any


class TrainState(NamedTuple):
    """Everything a step changes. Nested dicts of arrays, which `jax.jit` takes in fastest.

    Attributes:
      step: steps done so far, int32.
      params: the model's `nnx.Param`s.
      batch_stats: the model's `nnx.BatchStat`s.
      opt_state: the optimiser's.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


def data_mesh(devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with one axis, "data", over the given devices or all there are.

    Those of one process are neighbours, so that its share of a batch is one piece.
    """
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return jax.sharding.Mesh(np.array(devices), ("data",))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of the state: the whole of it on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def create_state(model: nnx.Module, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of a run that has not begun; it holds the model's own arrays."""
    params, batch_stats = _variables(model)
    return TrainState(jnp.int32(0), params, batch_stats, optimizer.init(params))


def abstract_state(model: nnx.Module, optimizer: optax.GradientTransformation) -> TrainState:
    """The shapes and dtypes of `create_state`, for a model that may be abstract itself."""
    params, batch_stats = _variables(model)
    opt_state = jax.eval_shape(optimizer.init, params)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, batch_stats, opt_state)


def _variables(model: nnx.Module) -> tuple[PyTree, ...]:
    return tuple(nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))


def make_train_step(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    *,
    preprocess: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled step: `state, metrics = step(state, batch)`.

    The old state's memory is reused for the new one. The batch is split over the devices of
    the mesh, and everything is computed as on one device that had the whole batch: gradient,
    batch statistics and random numbers do not depend on the number of devices.

    Args:
      model: gives the structure of the computation; its arrays are not used.
      optimizer: an Optax optimiser.
      preprocess: maps a random key and `batch["image"]` to what the model takes.
      key: the random key, into which the number of the step is folded.
      mesh: from `data_mesh`.

    Returns:
      A function whose metrics are the scalars `loss` (mean cross-entropy) and `accuracy`
      (fraction, top-1) of the batch, as the model was before the update.
    """
    graphdef = nnx.graphdef(nnx.view(model, use_running_average=False))

    def loss_fn(params, batch_stats, images, labels):
        model = nnx.merge(graphdef, params, batch_stats)
        logits = model(images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        images = preprocess(jax.random.fold_in(key, state.step), batch["image"])
        (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.batch_stats, images, batch["label"]
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        accuracy = (logits.argmax(axis=-1) == batch["label"]).mean()
        state = TrainState(state.step + 1, params, batch_stats, opt_state)
        return state, {"loss": loss, "accuracy": accuracy}

    return jax.jit(
        train_step,
        in_shardings=(replicated(mesh), batch_sharded(mesh)),
        out_shardings=replicated(mesh),
        donate_argnums=0,
    )
