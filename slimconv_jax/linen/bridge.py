"""Runs NNX modules inside Linen modules.

This does not use `flax.nnx.bridge.ToLinen`, which turns the integers in the paths of NNX lists into
dict keys that Linen's own tools, such as `flatten_dict(sep=...)`, do not take. It also draws new
initial values in each `apply`, which for a ResNet-50 takes ten seconds unless it is compiled.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Initializer

from slimconv_jax.errors import InputError
from slimconv_jax.models.layers import leave_devices
from slimconv_jax.models.mode import running_average, told
from slimconv_jax.models.slimify import name_of_path
from slimconv_jax.models.zoo import require_module

_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def variables(model: nnx.Module) -> dict[str, Any]:
    """Returns the variables of an NNX model for its Linen counterpart.

    Args:
      model: a model of this package, as `load_model`, `from_torch` and `create_model` return.

    Returns:
      {"params": ..., "batch_stats": ...}, nested dicts with strings as keys.

    Raises:
      ValueError: if it is not an NNX module.
    """
    require_module(model, "linen.variables")
    return {
        collection: unflatten_dict(
            {
                tuple(map(str, path)): variable[...]
                for path, variable in nnx.to_flat_state(nnx.state(model, kind))
            }
        )
        for collection, kind in _COLLECTIONS.items()
    }


def run_module(
    scope: nn.Module,
    build: Callable[..., nnx.Module],
    outline: nnx.Module,
    forward: Callable[[nnx.Module], Any],
    train: bool,
    boxes: Mapping[str, nn.meta.AxisMetadata] = MappingProxyType({}),
) -> Any:
    """Calls an NNX module whose variables are those of a Linen module.

    Args:
      scope: the Linen module, bound.
      build: `build(rngs=...)` is the NNX module with initial values.
      outline: the NNX module without its arrays.
      forward: calls it.
      train: whether batch statistics are computed, and, unless initialising, updated.
      boxes: the box, such as `nn.Partitioned`, for each "kernel" of a convolution and for the
        "bias" of the last one.

    Raises:
      ValueError: if a variable is missing or has another shape, a transform of Flax leaves out a
        collection, or `train` needs to update the batch statistics and cannot.
    """
    if not scope.variables.get("params") and scope.is_mutable_collection("params"):
        initial = build(rngs=nnx.Rngs(params=scope.make_rng("params")))
        for collection, tree in variables(initial).items():
            if not scope.is_mutable_collection(collection):
                raise InputError(
                    f"SlimConv has variables in {collection!r}, too, which the nn.scan, nn.vmap or "
                    f"the like around {name_of_path(scope.path)} has to map: variable_axes="
                    f"{{'params': 0, {collection!r}: 0}}, for example"
                )
            flat = flatten_dict(tree)
            for path, value in flat.items():
                if path[-1] in boxes and (value.ndim == 4 or path == ("project", "bias")):
                    flat[path] = boxes[path[-1]].replace_boxed(value)
            for name, value in unflatten_dict(flat).items():
                scope.put_variable(collection, name, value)
    if train and not scope.is_mutable_collection("batch_stats"):
        raise InputError(
            f"train=True of {type(scope).__name__} updates the batch statistics: pass "
            'mutable=["batch_stats"] to apply'
        )
    if scope.is_initializing():  # perhaps outside of the axis
        leave_devices(outline)
    for collection, kind in _COLLECTIONS.items():
        given = flatten_dict(nn.meta.unbox(unfreeze(scope.variables.get(collection, {}))))
        for path, variable in nnx.to_flat_state(nnx.state(outline, kind)):
            name = tuple(map(str, path))
            if name not in given or given[name].shape != variable.shape:
                raise InputError(
                    f"the variables of {type(scope).__name__} need {collection}/{'/'.join(name)} "
                    f"of shape {variable.shape}, and there is "
                    f"{given[name].shape if name in given else 'none'}"
                )
            variable.set_value(given[name])
    with running_average(not train), told(None):
        output = forward(outline)
    if train and not scope.is_initializing():
        # Keeps the boxes, such as `nn.Partitioned`, of the old ones.
        old = unfreeze(scope.variables["batch_stats"])
        new = nn.meta.replace_boxed(old, variables(outline)["batch_stats"])
        for name, value in new.items():
            scope.put_variable("batch_stats", name, value)
    return output


def mode_of(module: nn.Module, train: bool | None) -> bool:
    """Returns the mode of a call, or of the module, or of the network around it (see `slimify`).

    Initialising a module does not need one.

    Raises:
      ValueError: if both the call and the module set it, or nothing does.
    """
    if train is None and module.train is None:
        if told.value is not None:
            return not told.value
        if module.is_initializing():
            return False
    return nn.merge_param("train", module.train, train)


def boxes_of(**initializers: Initializer) -> dict[str, nn.meta.AxisMetadata]:
    """Returns the boxes of the initialisers of a "kernel" and a "bias"; see `run_module`."""
    key, shapes = jax.random.key(0), {"kernel": (3, 3, 1, 1), "bias": (1,)}
    values = {
        name: jax.eval_shape(lambda key, n=name: initializers[n](key, shapes[n], jnp.float32), key)
        for name in initializers
    }
    return {n: value for n, value in values.items() if isinstance(value, nn.meta.AxisMetadata)}


def unboxed(init: Initializer) -> Initializer:
    return lambda *args: nn.meta.unbox(init(*args))
