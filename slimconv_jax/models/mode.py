"""Training or evaluation, as the caller of a model tells it.

Flax has two ways: `model.train()` and `model.eval()` set attributes of the batch norms, or the
model takes the mode as an argument (`training`, `deterministic`, ...) and hands it to its own batch
norms. Layers that were put into a model later get no such argument. They hear it through a context.
"""

import copyreg
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from slimconv_jax.errors import InputError

_OF_DROPOUT = {"deterministic": False, "enable_dropout": True}
_MEANS_TRAINING = {
    "use_running_average": False,
    **dict.fromkeys(("train", "training", "is_training", "is_train", "train_mode"), True),
    **dict.fromkeys(("eval", "is_eval", "eval_mode", "evaluate"), False),
    **dict.fromkeys(("test", "is_test", "testing", "test_mode"), False),
    **dict.fromkeys(("inference", "is_inference", "inference_mode"), False),
    **_OF_DROPOUT,
}
"""The names that arguments for the mode have, and whether True means training.

Where there are several, the first one here counts, and those of dropout do not.
"""

running_average = jax.make_user_context(None)
"""Whether the batch norms of this package use their running averages; None: as each is set.

A context of JAX, so that `jax.jit` compiles once for each.
"""

told = jax.make_user_context(None)
"""What the modules around are told of their mode, as `running_average`; None if nothing.

Only layers that were put into a model follow it.
"""


@functools.lru_cache(maxsize=4096)
def mode_arguments(function: Callable) -> tuple[str, ...]:
    """The arguments of a function or method that tell the mode."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of what is not written in Python
        return ()
    return tuple(name for name in _MEANS_TRAINING if name in parameters)


def uses_running_average(
    function: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool | None:
    """The mode that a call tells, as `told` has it; None if it tells none.

    Args:
      function: what is called, unbound.
      args: its positional arguments, the first of which is the module.
      kwargs: its other arguments.

    Raises:
      ValueError: if the mode is traced.
    """
    if not (names := mode_arguments(function)):
        return None
    try:
        call = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return None  # the call itself says what is wrong
    given = set(call.arguments)
    call.apply_defaults()
    names = [name for name in names if name not in _OF_DROPOUT] or names
    return _mode_of({name: call.arguments[name] for name in names}, given)


def attribute_mode(module: Any) -> bool | None:
    """The mode that a Linen module has in its fields, as `told` has it; None if it has none."""
    fields = type(module).__dataclass_fields__
    return _mode_of({n: getattr(module, n) for n in _MEANS_TRAINING if n in fields}, set())


def _mode_of(values: Mapping[str, Any], given: set[str]) -> bool | None:
    """The first mode among values, of which those of dropout count if given, or if none is told."""
    for name, value in values.items():
        if name in _OF_DROPOUT and name not in given and told.value is not None:
            continue
        if isinstance(value, jax.core.Tracer):
            raise InputError(
                f"the mode {name} is traced; SlimConv needs it static, as batch norm does "
                f"(static_argnames={name!r} of jit)"
            )
        if isinstance(value, bool | int | np.generic | np.ndarray | jax.Array) and not np.ndim(
            value
        ):
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
        and hasattr(method, "__get__")
        and mode_arguments(method)
    }
    if not methods or is_telling(module_type):
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
    options = {} if module_type._pytree__is_pytree else {"pytree": False}
    return _picklable(type(module_type))(
        module_type.__name__, (module_type,), namespace | {"_tells_mode": True}, **options
    )


def is_telling(module_type: type) -> bool:
    """Whether a class is one of `telling`."""
    return getattr(module_type, "_tells_mode", False)


@functools.cache
def _picklable(metaclass: type) -> type:
    """A metaclass for the classes of `telling`, which pickle does not find by their names."""
    derived = type(metaclass.__name__, (metaclass,), {})
    copyreg.pickle(derived, lambda teller: (telling, teller.__bases__))
    return derived
