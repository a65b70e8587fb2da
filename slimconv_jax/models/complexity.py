"""Counts of parameters and multiply-adds, taken from the model itself."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import FlaxError
from jax.extend.core import ClosedJaxpr, Jaxpr

from slimconv_jax.errors import LIBRARY_ERRORS, InputError, require_integer
from slimconv_jax.models.mode import arguments_for, told, uses_running_average


@dataclasses.dataclass(frozen=True)
class Layer:
    """One module of a model, as `layers` reports it.

    Attributes:
      path: attribute names and indices from the model to the module.
      type: name of the module's class.
      shape: shape of its output, for a batch of one; None if the output is not a single array.
      params: trainable parameters in it.
      macs: multiply-adds of the convolutions and matrix products in it, for one image.
      told: whether the call of a batch norm or dropout says to use running averages; for other
        modules, whether the calls of the modules around it say so. None if they do not say.
    """

    path: tuple[str | int, ...]
    type: str
    shape: tuple[int, ...] | None
    params: int
    macs: int
    told: bool | None = None


def count_params(model: nnx.Module) -> int:
    """Counts the trainable parameters, without batch statistics."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def count_macs(model: nnx.Module, image_size: int | Sequence[int] = 224) -> int:
    """Counts the multiply-adds of one image through the model, in evaluation mode.

    Counts the convolutions and matrix products (the papers' "FLOPs"), including padding, in the
    program that JAX traces from the model: one iteration of a `while_loop`, all branches of a
    `cond`. Computes nothing and does not change the model.

    Args:
      model: maps images (N, H, W, C) to anything.
      image_size: pixels a side of an image of three channels, or (H, W, C).

    Raises:
      ValueError: if the image size is neither, or the model does not take such an image.
    """
    return count_program_macs(_trace(model, image_size).jaxpr)


def count_program_macs(jaxpr: Jaxpr) -> int:
    """Counts the multiply-adds of the convolutions and matrix products of any traced program.

    Leaves out the zeros that the gradient of a strided convolution puts between its inputs.
    """
    return sum(macs for _, macs in _products(jaxpr))


def layers(model: nnx.Module, image_size: int | Sequence[int] = 224) -> list[Layer]:
    """Lists the modules that a forward pass calls, in call order, each before its parts.

    The counts of a module include those of its parts. The first row is the model itself,
    with path (). Arguments and errors are those of `count_macs`.
    """
    rows: list[Layer] = []
    jaxpr = _trace(model, image_size, lambda model, x: _call_recorded(model, x, rows)).jaxpr
    macs = collections.Counter()
    for scopes, count in _products(jaxpr):
        macs.update(dict.fromkeys(scopes, count))
    return [dataclasses.replace(row, macs=macs[_scope(index)]) for index, row in enumerate(rows)]


def as_image_shape(image_size: int | Sequence[int]) -> tuple[int, int, int]:
    """Returns the (H, W, C) of an image size as `count_macs` takes it.

    Raises:
      ValueError: if it is neither an integer nor three of them, or not positive.
    """
    if not isinstance(image_size, Sequence):
        require_integer("image_size", image_size, 1)
        return (image_size, image_size, 3)
    if isinstance(image_size, str) or len(image_size) != 3:
        raise InputError(f"image_size={image_size!r} must be an integer, or (H, W, C)")
    for number in image_size:
        require_integer("image_size: height, width and channels: each", number, 1)
    return tuple(image_size)


def _call(model: nnx.Module, x: jax.Array) -> Any:
    return model(x, **arguments_for(type(model).__call__, training=False))


def _trace(
    model: nnx.Module,
    image_size: int | Sequence[int],
    forward: Callable[[nnx.Module, jax.Array], Any] = _call,
) -> ClosedJaxpr:
    """Traces a forward pass of one image, in evaluation mode."""
    image_shape = as_image_shape(image_size)
    graphdef, state = nnx.split(model)

    def run(state: nnx.State, x: jax.Array):
        copy = nnx.merge(graphdef, state)
        copy.eval()
        return forward(copy, x)

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        return jax.make_jaxpr(run)(state, image)
    except (*LIBRARY_ERRORS, FlaxError) as error:  # from any code, since it is the user's model
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"the model does not take an image of {'x'.join(map(str, image_shape))}: {reason}"
        ) from error


def _products(
    jaxpr: Jaxpr, repeats: int = 1, outer: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yields the named scopes and multiply-adds of each convolution and matrix product."""
    for eqn in jaxpr.eqns:
        scopes = (*outer, *str(eqn.source_info.name_stack).split("/"))
        shapes = [getattr(v.aval, "shape", ()) for v in (*eqn.invars, *eqn.outvars)]
        if eqn.primitive.name == "conv_general_dilated":
            _, kernel, output = shapes
            out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            zeros = math.prod(eqn.params["lhs_dilation"])
            macs = math.prod(output) * math.prod(kernel) // out_features // zeros
            yield scopes, repeats * macs
        elif eqn.primitive.name == "dot_general":
            lhs, _, output = shapes
            (contracted, _), _ = eqn.params["dimension_numbers"]
            yield scopes, repeats * math.prod(output) * math.prod(lhs[i] for i in contracted)
        else:
            inner_repeats = repeats * eqn.params.get("length", 1)  # of a scan
            if eqn.primitive.name == "shard_map":  # its program is that of one device
                inner_repeats *= eqn.params["mesh"].size
            params = dict(eqn.params)
            if params.get("branches_platforms"):  # one of them runs, and all compute the same
                params["branches"] = params["branches"][-1:]
            for inner in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    inner = getattr(inner, "jaxpr", inner)
                    yield from _products(inner, inner_repeats, scopes)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)


def _scope(index: int) -> str:
    """Returns the scope in which the module of row `index` runs, a name that no model uses."""
    return f"<row {index}>"


def _call_recorded(model: nnx.Module, x: jax.Array, rows: list[Layer]) -> Any:
    """Calls a model, and appends a row and opens a named scope for every module called.

    Python looks up `__call__` on the class, so this replaces `__call__` of the classes involved
    for the duration of the call.
    """
    paths = {id(module): path for path, module in nnx.iter_modules(model)}
    originals = {
        base: vars(base)["__call__"]
        for _, module in nnx.iter_modules(model)
        for base in type(module).__mro__
        if "__call__" in vars(base)
    }
    active = []

    def recorded(original: Callable) -> Callable:
        @functools.wraps(original)
        def call(module: nnx.Module, *args, **kwargs):
            if id(module) not in paths or (active and active[-1] is module):
                return original(module, *args, **kwargs)  # not of this model, or super().__call__
            index, mode = len(rows), told.value
            if isinstance(module, nnx.BatchNorm | nnx.Dropout):
                mode = uses_running_average(original, (module, *args), kwargs)
            path, name, params = paths[id(module)], type(module).__name__, count_params(module)
            rows.append(Layer(path, name, None, params, macs=0, told=mode))
            active.append(module)
            try:
                with jax.named_scope(_scope(index)):
                    output = original(module, *args, **kwargs)
            finally:
                active.pop()
            rows[index] = dataclasses.replace(rows[index], shape=getattr(output, "shape", None))
            return output

        return call

    try:
        for base, original in originals.items():
            base.__call__ = recorded(original)
        return _call(model, x)
    finally:
        for base, original in originals.items():
            base.__call__ = original
