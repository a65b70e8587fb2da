"""The mode of a model, training or evaluation, as its caller sets it.

Flax has two ways: `model.train()` and `model.eval()` set attributes of the batch norms, or the
model takes the mode as an argument (`training`, `deterministic`, ...) and passes it to its own
batch norms. Layers that were put into a model later do not get the argument; a context passes it on
to them.
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
"""The names of mode arguments, and whether True means training.

If a function has several, the first one here counts, and those of dropout do not.
"""

running_average = jax.make_user_context(None)
"""Whether the batch norms of this package use their running averages; None for their own settings.

A context of JAX, so that `jax.jit` compiles once for each value.
"""

told = jax.make_user_context(None)
"""The mode in the calls of the modules around, as in `running_average`; None if they have none.

Only layers that were put into a model follow it.
"""


@functools.lru_cache(maxsize=4096)
def mode_arguments(function: Callable) -> tuple[str, ...]:
    """Returns the names of the mode arguments of a function or method."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # for a function that is not written in Python
        return ()
    return tuple(name for name in _MEANS_TRAINING if name in parameters)


def uses_running_average(
    function: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool | None:
    """Returns the mode in a call, as in `told`; None if the call has none.

    Args:
      function: the function that is called, unbound.
      args: its positional arguments, the first of which is the module.
      kwargs: its keyword arguments.

    Raises:
      ValueError: if the mode is traced.
    """
    if not (names := mode_arguments(function)):
        return None
    try:
        call = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return None  # the call itself will raise
    given = set(call.arguments)
    call.apply_defaults()
    names = [name for name in names if name not in _OF_DROPOUT] or names
    return _mode_of({name: call.arguments[name] for name in names}, given)


def attribute_mode(module: Any) -> bool | None:
    """Returns the mode in the fields of a Linen module, as in `told`; None if it has none."""
    fields = type(module).__dataclass_fields__
    return _mode_of({n: getattr(module, n) for n in _MEANS_TRAINING if n in fields}, set())


def _mode_of(values: Mapping[str, Any], given: set[str]) -> bool | None:
    """Returns the first mode among values; defaults for dropout only count if `told` is None."""
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
    """Returns the keyword arguments that set the mode in a call of a function or method."""
    return {name: training is _MEANS_TRAINING[name] for name in mode_arguments(function)}


@functools.cache
def telling(module_type: type[nnx.Module]) -> type[nnx.Module]:
    """Derives a class whose calls pass their mode on to the layers inside.

    The derived class has the same name and everything else. Returns the class itself if its
    methods have no mode argument.
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
    """Returns whether `telling` derived a class."""
    return getattr(module_type, "_tells_mode", False)


@functools.cache
def _picklable(metaclass: type) -> type:
    """Derives a metaclass for the classes of `telling`, which pickle cannot find by name."""
    derived = type(metaclass.__name__, (metaclass,), {})
    copyreg.pickle(derived, lambda teller: (telling, teller.__bases__))
    return derived
