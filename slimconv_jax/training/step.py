"""Builds the training step: a pure function from state and batch to state and metrics."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from slimconv_jax.devices import batch_sharded, replicated
from slimconv_jax.errors import InputError, require_choice, require_integer, require_number
from slimconv_jax.models.layers import at_least_float32
from slimconv_jax.models.variables import merge, variables
from slimconv_jax.training.distillation import Teacher
from slimconv_jax.training.fine_tuning import trained
from slimconv_jax.training.loss import Loss

PyTree = Any
Metrics = dict[str, jax.Array]

AVERAGED = ("params", "batch_stats")

_SCALES = 2**31
"""Folded into the key of a step; `augment` splits that key, and no part of it is this one."""

BATCH_NORM = ("global", "per_device", "frozen")


class TrainState(NamedTuple):
    """Everything that a step changes, as nested dicts of arrays, the fastest input of `jax.jit`.

    Attributes:
      step: steps done so far, int32.
      variables: the model's, by collection; see `slimconv_jax.models.variables`.
      opt_state: the optimiser's.
      ema: the exponential moving average of the collections in `AVERAGED`, or None.
    """

    step: jax.Array
    variables: dict[str, PyTree]
    opt_state: PyTree
    ema: dict[str, PyTree] | None = None

    @property
    def params(self) -> PyTree:
        """The collection of learnt parameters."""
        return self.variables["params"]

    @property
    def batch_stats(self) -> PyTree:
        """The collection of running means and variances."""
        return self.variables["batch_stats"]


def create_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """Builds the state of a new run, which holds the model's own arrays.

    Args:
      model: with the initial parameters.
      optimizer: from `create_optimizer`.
      ema: whether to keep a moving average, which starts as a copy of the model.
    """
    return _state(optimizer, ema, variables(model))


def abstract_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """Returns the shapes and dtypes of `create_state`; the model may be abstract, too."""
    return jax.eval_shape(functools.partial(_state, optimizer, ema), variables(model))


def _state(
    optimizer: optax.GradientTransformation, ema: bool, start: dict[str, PyTree]
) -> TrainState:
    average = jax.tree.map(jnp.copy, {name: start[name] for name in AVERAGED}) if ema else None
    return TrainState(jnp.int32(0), start, optimizer.init(start["params"]), average)


def _norm(tree: PyTree) -> jax.Array:
    """Computes the Euclidean norm of all leaves together, with one sum over all of them."""
    return jnp.sqrt(jnp.stack([jnp.square(x).sum() for x in jax.tree.leaves(tree)]).sum())


def make_train_step(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    learning_rate_fn: optax.Schedule,
    num_classes: int,
    augment: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    normalize: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    mesh: jax.sharding.Mesh,
    loss: Loss = optax.softmax_cross_entropy,
    draw_scales: Callable[[jax.Array, int], dict[str, jax.Array]] = lambda key, count: {},
    freeze: Sequence[str] = (),
    average: Callable[[PyTree, PyTree], PyTree] | None = None,
    teacher: Teacher | None = None,
    *,
    accumulation_steps: int = 1,
    batch_norm: str = "global",
    ema_decay: float = 0.0,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Builds the compiled step, `state, metrics = step(state, batch)`.

    The keyword-only arguments are the keys of `config.step`.

    On TPUs the new state reuses the memory of the old one. The batch is split over the devices of
    the mesh, and the results are those of one device with the whole batch: gradient, batch
    statistics and random numbers do not depend on the number of devices (with
    `batch_norm="per_device"`, all except the statistics).

    Args:
      model: gives the structure of the computation; its arrays are not used.
      optimizer: an Optax optimiser.
      learning_rate_fn: the schedule inside it, for the metrics.
      num_classes: outputs of the model.
      augment: maps a random key, `batch["image"]` and one-hot labels to images and targets.
      normalize: maps these images to inputs of the model.
      key: the random key, into which the number of the step is folded.
      mesh: from `slimconv_jax.devices.data_mesh`.
      loss: maps logits and targets, both (N, num_classes), to losses (N,).
      draw_scales: maps a random key and a number of images to keyword arguments of the model, each
        with a row for each image.
      freeze: patterns of names of parameters that stay as they are, as in the optimiser; their
        gradients are not computed.
      average: maps the optimiser's state and the parameters to averaged ones, which take the place
        of the moving average; None for optimisers without.
      teacher: a model to learn from as well.
      accumulation_steps: the number of parts in which the batch is computed, one after the
        other, which takes less memory. The gradient is the mean over the parts; batch statistics
        are those of each part. Part i has every `accumulation_steps`-th image, starting at i.
      batch_norm: the statistics that normalise: "global", of the whole batch on all devices;
        "per_device", of each device's share, without communication within the model, so that the
        results depend on the number of devices (the running averages are means over the devices);
        "frozen", the running averages, which do not change.
      ema_decay: per step, of the moving average of parameters and batch statistics; 0 for none.
        It starts lower, at (1 + step) / (10 + step), so that the average soon forgets the initial
        values.

    Returns:
      A `functools.partial` of the compiled function with what all steps share as its first
      argument: the data of the key and the teacher's variables. So
      `step.func.lower(*step.args, state, batch)` lowers it; once on the devices, they need not go
      there at every call. Its metrics are scalars: `loss` (the
      mean, of the mixed targets and the teacher) and `accuracy` (fraction, top-1; of mixed images,
      of the larger part) of the batch, as the model was before the update, `grad_norm`, and
      `learning_rate`; with a teacher, also its two parts, `label_loss` and `distillation_loss`,
      without their weights.

    Raises:
      ValueError: if a setting is out of range.
    """
    require_integer("step: accumulation_steps", accumulation_steps, 1)
    require_number("step: ema_decay", ema_decay, least=0, below=1)
    require_choice("step: batch_norm", batch_norm, BATCH_NORM)
    if average is not None and ema_decay:
        raise InputError("step: ema_decay is not for an optimiser that averages by itself")
    # The key is an argument of the program, so that all seeds share one compiled program.
    impl = jax.random.key_impl(key)
    frozen = batch_norm == "frozen"
    model = nnx.view(model, use_running_average=frozen, raise_if_not_found=False)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.axis_name = "data" if batch_norm == "global" else None
    graphdef = nnx.graphdef(model)

    def loss_fn(params, rest, taught, images, targets, scales):
        if freeze:
            keep = jax.lax.stop_gradient
            is_trained = trained(params, freeze)
            params = jax.tree.map(lambda p, learns: p if learns else keep(p), params, is_trained)
        model = merge(graphdef, {"params": params, **rest})
        logits = model(normalize(images), **scales)
        accuracy = (logits.argmax(axis=-1) == targets.argmax(axis=-1)).mean(dtype=targets.dtype)
        rest = variables(model)
        del rest["params"]
        value, metrics = loss(logits, targets).mean(), {"accuracy": accuracy}
        if teacher is not None:
            with jax.named_scope("teacher"):
                answers = merge(teacher.graphdef, taught)(teacher.normalize(images))
            distance = teacher.loss(logits, answers).mean()
            metrics |= {"label_loss": value, "distillation_loss": distance}
            value = (1 - teacher.weight) * value + teacher.weight * distance
        return value, (rest, metrics)

    def part(params, *args):
        """Returns the other variables after some images, their gradient and metrics."""
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (value, (rest, metrics)), grads = value_and_grad(params, *args)
        return rest, grads, {"loss": value} | metrics

    def whole(params, rest, taught, *batch):
        """Returns the same for a batch, computed in `accumulation_steps` parts."""
        if accumulation_steps == 1:
            return part(params, rest, taught, *batch)

        def add_part(carry, batch):
            rest, *sums = carry
            rest, *terms = part(params, rest, taught, *batch)
            return (rest, *jax.tree.map(jnp.add, sums, terms)), None

        # Each part takes every n-th image of each device, so that none moves between devices.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1),
            batch,
        )
        first = jax.tree.map(lambda x: x[0], parts)
        _, grads, metrics = jax.eval_shape(part, params, rest, taught, *first)
        start = (rest, *jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics)))
        (rest, *sums), _ = jax.lax.scan(add_part, start, parts)
        return rest, *jax.tree.map(lambda x: x / accumulation_steps, sums)

    everywhere, split = PartitionSpec(), PartitionSpec("data")

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(everywhere, everywhere, everywhere, split, split, split),
        out_specs=everywhere,
        check_vma=False,  # else JAX itself would sum the gradients, once for each part
    )
    def whole_on_all_devices(*args):
        rest, *means = whole(*args)
        if batch_norm == "per_device":  # else the statistics are equal on all devices
            rest["batch_stats"] = jax.lax.pmean(rest["batch_stats"], "data")
        return rest, *jax.lax.pmean(means, "data")

    def train_step(shared: tuple, state: TrainState, batch: dict[str, jax.Array]):
        key_data, taught = shared
        # In the precision of the parameters, which jax_enable_x64 alone does not change.
        params = state.params
        dtype = at_least_float32(jax.tree.leaves(params)[0].dtype)
        targets = jax.nn.one_hot(batch["label"], num_classes, dtype=dtype)
        step_key = jax.random.fold_in(jax.random.wrap_key_data(key_data, impl=impl), state.step)
        with jax.named_scope("augment"):
            images, targets = augment(step_key, batch["image"], targets)
        scales = draw_scales(jax.random.fold_in(step_key, _SCALES), len(targets))
        rest = {name: tree for name, tree in state.variables.items() if name != "params"}
        rest, grads, metrics = whole_on_all_devices(params, rest, taught, images, targets, scales)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, params)
            after = optax.apply_updates(params, updates)
            if freeze:  # to the bit, with -0.0 too
                is_trained = trained(params, freeze)
                after = jax.tree.map(lambda a, p, t: a if t else p, after, params, is_trained)
            params = after
        step, after = state.step + 1, {"params": params, **rest}
        ema = state.ema
        if average is not None:
            ema = {"params": average(opt_state, params), "batch_stats": rest["batch_stats"]}
        elif ema is not None:
            at_first = (1 + step).astype(jnp.float32) / (10 + step).astype(jnp.float32)
            decay = jnp.minimum(ema_decay, at_first)
            ema = optax.incremental_update({name: after[name] for name in ema}, ema, 1 - decay)
        metrics |= {
            "grad_norm": _norm(grads),
            "learning_rate": jnp.asarray(learning_rate_fn(state.step)),
        }
        return TrainState(step, after, opt_state, ema), metrics

    # TPUs have the least memory. Elsewhere XLA copies donated arrays one by one, since it cannot
    # see that each is read before it is written: 258 kernels of sc_resnet50 on a GPU.
    compiled = jax.jit(
        train_step,
        in_shardings=(replicated(mesh), replicated(mesh), batch_sharded(mesh)),
        out_shardings=replicated(mesh),
        donate_argnums=(1,) if mesh.devices.flat[0].platform == "tpu" else (),
    )
    taught = {} if teacher is None else teacher.variables
    return functools.partial(compiled, (np.asarray(jax.random.key_data(key)), taught))
