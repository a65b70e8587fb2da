"""Training or evaluation, as the caller of a model tells it.

Flax has two ways: `model.train()` and `model.eval()` set attributes of the batch norms, or the
model takes the mode as an argument (`training`, `deterministic`, ...) and hands it to its own batch
norms. Layers that were put into a model later get no such argument. They hear it through a context.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

_MEANS_TRAINING = {
    **dict.fromkeys(("train", "training", "is_training", "is_train", "train_mode"), True),
    **dict.fromkeys(("use_running_average", "deterministic", "inference"), False),
    **dict.fromkeys(("eval", "is_eval", "eval_mode"), False),
}
"""The names that arguments for the mode have, and whether True means training."""

told = jax.make_user_context(None)
"""Whether batch norms use their running averages, as a caller tells it; None if none does.

A context of JAX, so that `jax.jit` compiles once for each.
"""


@functools.lru_cache(maxsize=4096)
def mode_arguments(function: Callable) -> tuple[str, ...]:
    """The arguments of a function or method that tell the mode."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of what is not written in Python
        return ()
    return tuple(name for name in parameters if name in _MEANS_TRAINING)


def uses_running_average(
    function: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool | None:
    """The mode that a call tells, as `told` has it; None if it tells none.

    Args:
      function: what is called, unbound.
      args: its positional arguments, the first of which is the module.
      kwargs: its other arguments.
    """
    if not (names := mode_arguments(function)):
        return None
    try:
        call = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return None  # the call itself says what is wrong
    call.apply_defaults()
    for name in names:
        value = call.arguments[name]
        if isinstance(value, bool | np.bool_):
            return bool(value) is not _MEANS_TRAINING[name]
    return None


def arguments_for(function: Callable, *, training: bool) -> dict[str, bool]:
    """What to call a function or method with for a mode."""
    return {name: training is _MEANS_TRAINING[name] for name in mode_arguments(function)}


@functools.cache
def telling(module_type: type[nnx.Module]) -> type[nnx.Module]:
    """The class of a module, or, if calls tell it the mode, one that tells the layers inside.

    It has the name and everything else of the class that it is derived from.
    """
    methods = {
        name: method
        for name in dir(module_type)
        if (name == "__call__" or not hasattr(nnx.Module, name))
        and not isinstance(
            method := inspect.getattr_static(module_type, name), staticmethod | classmethod | type
        )
        and callable(method)
        and mode_arguments(method)
    }
    if not methods or getattr(module_type, "_tells_mode", False):
        return module_type

    def tell(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(*args, **kwargs):
            mode = uses_running_average(method, args, kwargs)
            with told(told.value if mode is None else mode):
                return method.__get__(args[0], type(args[0]))(*args[1:], **kwargs)

        return call

    namespace = {name: tell(method) for name, method in methods.items()}
    for name in ("__module__", "__qualname__", "__doc__"):
        namespace[name] = getattr(module_type, name)
    return type(module_type)(
        module_type.__name__,
        (module_type,),
        namespace | {"_tells_mode": True},
        pytree=module_type._pytree__is_pytree,
    )
