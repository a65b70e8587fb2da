"""NNX modules inside Linen modules.

`flax.nnx.bridge.ToLinen` is not used, since the integers in the paths of NNX lists become keys of
dicts there, which Linen's own tools (`flatten_dict(sep=...)`, say) do not take, and each `apply`
draws new initial values, which for a ResNet-50 takes ten seconds unless it is compiled.
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
    """The variables of an NNX model for its Linen counterpart.

    Args:
      model: of this package, such as `load_model`, `from_torch` and `create_model` return.

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
    outline: Callable[[], nnx.Module],
    forward: Callable[[nnx.Module], Any],
    train: bool,
    boxes: Mapping[str, nn.meta.AxisMetadata] = MappingProxyType({}),
) -> Any:
    """Calls an NNX module whose variables are those of a Linen module.

    Args:
      scope: the Linen module, bound.
      build: `build(rngs=...)` is the NNX module with initial values.
      outline: gives the NNX module without its arrays.
      forward: what to call it with.
      train: whether batch statistics are computed, and, unless initialising, updated.
      boxes: what each "kernel" of a convolution and the "bias" of the last one is put in, such as
        `nn.Partitioned`.
    """
    if not scope.variables.get("params") and scope.is_mutable_collection("params"):
        initial = build(rngs=nnx.Rngs(params=scope.make_rng("params")))
        for collection, tree in variables(initial).items():
            flat = flatten_dict(tree)
            for path, value in flat.items():
                if path[-1] in boxes and (value.ndim == 4 or path == ("project", "bias")):
                    flat[path] = boxes[path[-1]].replace_boxed(value)
            for name, value in unflatten_dict(flat).items():
                _put(scope, collection, name, value)
    if train and not scope.is_mutable_collection("batch_stats"):
        raise InputError(
            f"train=True of {type(scope).__name__} updates the batch statistics: apply takes "
            'mutable=["batch_stats"], too'
        )
    module = outline()
    if scope.is_initializing():  # which may be outside of the axis
        leave_devices(module)
    for collection, kind in _COLLECTIONS.items():
        given = flatten_dict(nn.meta.unbox(unfreeze(scope.variables.get(collection, {}))))
        for path, variable in nnx.to_flat_state(nnx.state(module, kind)):
            name = tuple(map(str, path))
            if name not in given or given[name].shape != variable.shape:
                raise InputError(
                    f"the variables of {type(scope).__name__} need {collection}/{'/'.join(name)} "
                    f"of shape {variable.shape}, and there is "
                    f"{given[name].shape if name in given else 'none'}"
                )
            variable.set_value(given[name])
    with running_average(not train), told(None):
        output = forward(module)
    if train and not scope.is_initializing():
        # In the boxes, such as `nn.Partitioned`, that the old ones are in.
        old = unfreeze(scope.variables["batch_stats"])
        new = nn.meta.replace_boxed(old, variables(module)["batch_stats"])
        for name, value in new.items():
            scope.put_variable("batch_stats", name, value)
    return output


def _put(scope: nn.Module, collection: str, name: str, value: Any) -> None:
    """Makes a variable of a module.

    Raises:
      ValueError: if a transform of Flax leaves the collection out.
    """
    if not scope.is_mutable_collection(collection):
        raise InputError(
            f"SlimConv has variables in {collection!r}, too, which the nn.scan, nn.vmap or the "
            f"like around {name_of_path(scope.path)} has to map: variable_axes={{'params': 0, "
            f"{collection!r}: 0}}, for example"
        )
    scope.put_variable(collection, name, value)


def mode_of(module: nn.Module, train: bool | None) -> bool:
    """The mode of a call, or of the module, or of the network around it (see `slimify`).

    Initialising a module takes none.

    Raises:
      ValueError: if the call and the module tell it, or nothing does.
    """
    known = train is not None or module.train is not None
    if not known and told.value is not None:
        return not told.value
    if not known and module.is_initializing():
        return False
    return nn.merge_param("train", module.train, train)


def boxes_of(**initializers: Initializer) -> dict[str, nn.meta.AxisMetadata]:
    """What the initialisers of a "kernel" and a "bias" put their values in; see `run_module`."""
    key, shapes = jax.random.key(0), {"kernel": (3, 3, 1, 1), "bias": (1,)}
    values = {
        name: jax.eval_shape(
            lambda key, name=name: initializers[name](key, shapes[name], jnp.float32), key
        )
        for name in initializers
    }
    return {n: value for n, value in values.items() if isinstance(value, nn.meta.AxisMetadata)}


def unboxed(init: Initializer) -> Initializer:
    return lambda *args: nn.meta.unbox(init(*args))
