"""SlimConv in place of the 3x3 convolutions of any Linen network."""

import collections
import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from slimconv_jax.errors import InputError
from slimconv_jax.linen.layers import (
    SlimmedConv,
    is_3x3,
    norm_settings,
    replacement_of,
    run_replacement,
)
from slimconv_jax.models.complexity import count_params, count_program_macs
from slimconv_jax.models.mode import arguments_for, attribute_mode, told, uses_running_average
from slimconv_jax.models.projected import count_conv_params
from slimconv_jax.models.slimconv import CompressionRatio, k_from_reduction, reduction_from_k
from slimconv_jax.models.slimify import Replacement, SlimifyReport, name_of_path, require_some


class Slimified(nn.Module):
    """A Linen network with SlimConv in it; `slimify` makes it.

    Its variables have the paths of the network's own. It is called as the network is.

    Attributes:
      module: the network.
      reduction: r of the SlimConvs.
      where: see `slimify`, as for all others.
    """

    module: nn.Module
    reduction: int
    where: Callable[[tuple[str, ...], nn.Conv], bool] | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    train: bool | None = None

    def setup(self):
        nn.share_scope(self, self.module)

    def __call__(self, *args, **kwargs) -> Any:
        """What the network makes of its arguments.

        Raises:
          ValueError: if the network is told no mode, has no 3x3 convolution that `where`
            chooses, or has batch norms over devices that `axis_name` is not about.
        """
        return self.call_method("__call__", *args, **kwargs)

    def call_method(self, name: str, *args, **kwargs) -> Any:
        """What another method of the network makes of its arguments.

            slim.apply(variables, "encode", images, method="call_method")

        Errors are those of a call.
        """
        found = _Found()
        with _intercepting(self, found, anew=self.is_initializing()):
            output = getattr(self.module, name)(*args, **kwargs)
        if self.is_initializing():
            found.check()
        if found.replaced and (others := found.norms["axis_name"] - {None, self.axis_name}):
            raise InputError(
                f"the network's batch norms take the devices of the axis {min(others)!r} together; "
                f"those of SlimConv do so with linen.slimify(module, axis_name={min(others)!r})"
            )
        return output

    def report(self, *args, **kwargs) -> SlimifyReport:
        """What is replaced and left, and parameters and multiply-adds, for such arguments.

        Args:
          *args: what the network is called with, such as `jnp.zeros((1, 224, 224, 3))`. Nothing is
            computed.
          **kwargs: likewise; unless the mode is among the arguments, it is that of evaluation.

        Raises:
          ValueError: as a call.
        """
        function = type(self.module).__call__
        given = inspect.signature(function).bind_partial(self.module, *args, **kwargs).arguments
        modes = arguments_for(function, training=False)
        kwargs |= {name: mode for name, mode in modes.items() if name not in given}
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = {i: leaf for i, leaf in enumerate(leaves) if _is_traced(leaf)}
        num_images, *image_shape = next((x.shape for x in arrays.values() if x.shape), (1,))
        found = _Found()

        def run(arrays: dict[int, jax.Array]) -> Any:
            args, kwargs = treedef.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])
            return self.module.init_with_output(jax.random.key(0), *args, **kwargs)

        def count() -> tuple[int, int]:
            jaxpr, (_, variables) = jax.make_jaxpr(run, return_shape=True)(arrays)
            macs = count_program_macs(jaxpr.jaxpr) // max(num_images, 1)
            return _count_params(variables["params"]), macs

        before = count()
        with _intercepting(self, found, anew=True):
            after = count()
        found.check()
        return SlimifyReport(
            k=k_from_reduction(self.reduction),
            replaced=found.replaced,
            left=found.left,
            not_chosen=tuple(found.not_chosen),
            params=(before[0], after[0]),
            macs=(before[1], after[1]),
            image_shape=tuple(image_shape),
            notes=tuple(
                f"the network has batch norms of {name}={min(others)}, and the new ones have "
                f"{getattr(self, name)}; linen.slimify(module, {name}=...) sets it"
                for name in ("momentum", "epsilon")
                if (others := found.norms[name] - {getattr(self, name)})
            ),
        )


def _is_traced(leaf: Any) -> bool:
    """Whether an argument of a network is an array; scalars may be modes."""
    return isinstance(leaf, jax.ShapeDtypeStruct) or (hasattr(leaf, "dtype") and np.ndim(leaf) > 0)


def _count_params(tree: Any) -> int:
    return sum(math.prod(np.shape(x)) for x in jax.tree.leaves(tree))


@dataclasses.dataclass
class _Found:
    """The 3x3 convolutions of a network by path, as in `SlimifyReport`, and more about it.

    Attributes:
      norms: the values of each setting of its batch norms.
      wrapper: what changes the parameters of the modules that are called now.
    """

    replaced: dict = dataclasses.field(default_factory=dict)
    left: dict = dataclasses.field(default_factory=dict)
    not_chosen: list = dataclasses.field(default_factory=list)
    norms: dict = dataclasses.field(default_factory=lambda: collections.defaultdict(set))
    wrapper: str | None = None

    def check(self) -> None:
        """See `require_some`."""
        none = "the network has no nn.Conv of 3x3"
        require_some(self.replaced, self.left, self.not_chosen, none)


_slimified = jax.make_user_context(None)
"""What is put into a network. A context of JAX, so that `nn.jit` in it compiles for each."""


@contextlib.contextmanager
def _intercepting(slimified: Slimified, found: _Found, *, anew: bool) -> Iterator[None]:
    """Puts SlimConv into the networks that are called.

    Args:
      slimified: says where and of which settings.
      found: gets what there is.
      anew: whether parts that `nn.jit` has compiled are traced again, so that they get in `found`.
    """
    settings = [
        getattr(slimified, field.name)
        for field in dataclasses.fields(slimified)
        if field.name not in ("module", "parent", "name")
    ]
    with (
        _slimified((*settings, object() if anew else None)),
        nn.intercept_methods(functools.partial(_intercept, slimified, found)),
    ):
        yield


def _intercept(
    slimified: Slimified,
    found: _Found,
    method: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Calls a method of any module in the network, or SlimConv in its place."""
    module, name = context.module, context.method_name
    # Transforms of Flax call what is not an attribute of the class.
    function = getattr(type(module), name, None)
    mode = function and uses_running_average(function, (module, *args), kwargs)
    if mode is None:
        mode = attribute_mode(module)
    if isinstance(module, nn.BatchNorm):
        for setting in ("axis_name", "momentum", "epsilon"):
            found.norms[setting].add(getattr(module, setting))
    outer = found.wrapper
    if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
        found.wrapper = type(module).__name__
    try:
        with told(told.value if mode is None else mode):
            if isinstance(module, nn.Conv) and name == "__call__" and is_3x3(module):
                return _call_conv(slimified, found, method, module, args, kwargs)
            return method(*args, **kwargs)
    finally:
        found.wrapper = outer


def _call_conv(
    slimified: Slimified,
    found: _Found,
    method: Callable,
    conv: nn.Conv,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Calls a 3x3 convolution, or SlimConv in its place."""
    path = conv.path
    if type(conv) is SlimmedConv:
        return method(*args, **kwargs)
    if slimified.where is not None and not slimified.where(path, conv):
        found.not_chosen.append(path)
        return method(*args, **kwargs)
    inputs = kwargs["inputs"] if "inputs" in kwargs else args[0]
    try:
        if type(conv) is not nn.Conv:
            raise InputError(f"it is a {type(conv).__name__}, not an nn.Conv itself")
        if found.wrapper:
            raise InputError(f"it is in a {found.wrapper}, which changes its parameters")
        build, outline = replacement_of(conv, inputs, slimified.reduction, norm_settings(slimified))
    except InputError as error:
        found.left[path] = str(error)
        return method(*args, **kwargs)
    counts = count_conv_params(conv, inputs.shape[-1]), count_params(outline)
    found.replaced[path] = Replacement(inputs.shape[-1], conv.features, counts, None)
    train = slimified.train if told.value is None else not told.value
    if train is None and not conv.is_initializing():
        raise InputError(
            f"nothing tells the SlimConv that replaces {name_of_path(path)} whether it is "
            "trained; linen.slimify(module, train=...) does, and so does slim.clone(train=...)"
        )
    return run_replacement(conv, build, outline, inputs, bool(train))


def slimify(
    module: nn.Module,
    *,
    k: CompressionRatio = "4/3",
    where: Callable[[tuple[str, ...], nn.Conv], bool] | None = None,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
    train: bool | None = None,
) -> Slimified:
    """A Linen network with SlimConv in place of its 3x3 convolutions.

        slim = slimconv_jax.linen.slimify(ResNet50(num_classes=10))
        print(slim.report(images))
        variables = slim.init(key, images)

    In place of an `nn.Conv` comes what `slimconv_jax.slimify` puts in place of an `nnx.Conv`, and
    the same are left. The rest of the network stays as it is, and finds its variables where they
    were. The new batch norms are in the mode that the module around them is told by an argument
    (`train`, `deterministic`, ...).

    Args:
      module: any network, unbound.
      k: compression ratio of SlimConv, 2r/3 for an integer r >= 2.
      where: `where(path, conv)` says whether to replace a 3x3 convolution; the path has the names
        that lead to it, such as ("Block_0", "Conv_1"). None replaces all.
      momentum: of the new batch norms, as the next two see `slimconv_jax.SlimConv`.
      epsilon: of the new batch norms.
      axis_name: of the new batch norms; needed where those of the network have one.
      train: the mode, where the network is told none.

    Raises:
      ValueError: if `k` is none, or the module is none of Linen.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"linen.slimify takes a Linen module, not a {type(module).__name__}")
    if where is not None and not callable(where):
        raise InputError(f"slimify: where={where!r} must be a function of a path and a convolution")
    return Slimified(module, reduction_from_k(k), where, momentum, epsilon, axis_name, train)
