"""Replaces the 3x3 convolutions of any Linen network by SlimConv."""

import collections
import contextlib
import dataclasses
import inspect
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
    """A Linen network with SlimConv in it; `slimify` builds it.

    Its variables have the paths of the network's own, and its calls take the same arguments.

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
        """Calls the network.

        Raises:
          ValueError: if the mode is unknown, `where` chooses no 3x3 convolution of the network, or
            the network has batch norms over another device axis than `axis_name`.
        """
        return self.call_method("__call__", *args, **kwargs)

    def call_method(self, name: str, *args, **kwargs) -> Any:
        """Calls another method of the network.

            slim.apply(variables, "encode", images, method="call_method")

        Errors are those of a call.
        """
        replacer = _Replacer(self)
        with replacer.intercepting(anew=self.is_initializing()):
            output = getattr(self.module, name)(*args, **kwargs)
        if self.is_initializing():
            replacer.check()
        if replacer.replaced and (others := replacer.norms["axis_name"] - {None, self.axis_name}):
            raise InputError(
                f"the network's batch norms span the devices of the axis {min(others)!r}; for "
                f"SlimConv's to do so, use linen.slimify(module, axis_name={min(others)!r})"
            )
        return output

    def report(self, *args, **kwargs) -> SlimifyReport:
        """Reports the replacements, parameters and multiply-adds for a call, without computing it.

        Args:
          *args: the arguments of the network, such as `jnp.zeros((1, 224, 224, 3))`.
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
        replacer = _Replacer(self)

        def run(arrays: dict[int, jax.Array]) -> Any:
            args, kwargs = treedef.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])
            return self.module.init_with_output(jax.random.key(0), *args, **kwargs)

        def count() -> tuple[int, int]:
            jaxpr, (_, variables) = jax.make_jaxpr(run, return_shape=True)(arrays)
            params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
            return params, count_program_macs(jaxpr.jaxpr) // max(num_images, 1)

        before = count()
        with replacer.intercepting(anew=True):
            after = count()
        replacer.check()
        return SlimifyReport(
            k=k_from_reduction(self.reduction),
            replaced=replacer.replaced,
            left=replacer.left,
            not_chosen=tuple(replacer.not_chosen),
            params=(before[0], after[0]),
            macs=(before[1], after[1]),
            image_shape=tuple(image_shape),
            notes=tuple(
                f"the network has batch norms of {name}={min(others)}, and the new ones have "
                f"{getattr(self, name)}; linen.slimify(module, {name}=...) sets it"
                for name in ("momentum", "epsilon")
                if (others := replacer.norms[name] - {getattr(self, name)})
            ),
        )


def _is_traced(leaf: Any) -> bool:
    """Returns whether an argument of a network is an array; scalars may be modes."""
    return isinstance(leaf, jax.ShapeDtypeStruct) or (hasattr(leaf, "dtype") and np.ndim(leaf) > 0)


_slimified = jax.make_user_context(None)
"""The settings of the SlimConvs in a network. A context of JAX: `nn.jit` compiles for each."""


@dataclasses.dataclass
class _Replacer:
    """Puts SlimConv into a network while it is called, and records what it finds there.

    Attributes:
      slimified: the network, and the settings of the SlimConvs.
      replaced: 3x3 convolutions of the network by path, as the next two in `SlimifyReport`.
      norms: the values of each setting of its batch norms.
      wrapper: the module around the current call that changes the parameters of its parts.
    """

    slimified: Slimified
    replaced: dict = dataclasses.field(default_factory=dict)
    left: dict = dataclasses.field(default_factory=dict)
    not_chosen: list = dataclasses.field(default_factory=list)
    norms: dict = dataclasses.field(default_factory=lambda: collections.defaultdict(set))
    wrapper: str | None = None

    def check(self) -> None:
        """Checks that there was a convolution to replace (see `require_some`)."""
        none_found = "the network has no nn.Conv of 3x3"
        require_some(self.replaced, self.left, self.not_chosen, none_found)

    @contextlib.contextmanager
    def intercepting(self, *, anew: bool) -> Iterator[None]:
        """Intercepts the calls of modules.

        Args:
          anew: whether to trace parts that `nn.jit` has compiled again, to record them.
        """
        settings = [
            getattr(self.slimified, field.name)
            for field in dataclasses.fields(self.slimified)
            if field.name not in ("module", "parent", "name")
        ]
        with (
            _slimified((*settings, object() if anew else None)),
            nn.intercept_methods(self._intercept),
        ):
            yield

    def _intercept(
        self,
        method: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Calls a method of any module in the network, or SlimConv instead."""
        module, name = context.module, context.method_name
        # Transforms of Flax call methods that are not attributes of the class.
        function = getattr(type(module), name, None)
        mode = function and uses_running_average(function, (module, *args), kwargs)
        if mode is None:
            mode = attribute_mode(module)
        if isinstance(module, nn.BatchNorm):
            for setting, value in norm_settings(module).items():
                self.norms[setting].add(value)
        outer = self.wrapper
        if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
            self.wrapper = type(module).__name__
        is_conv = isinstance(module, nn.Conv) and type(module) is not SlimmedConv
        try:
            with told(told.value if mode is None else mode):
                if is_conv and name == "__call__" and is_3x3(module):
                    return self._call_conv(module, method, args, kwargs)
                return method(*args, **kwargs)
        finally:
            self.wrapper = outer

    def _call_conv(self, conv: nn.Conv, method: Callable, args: tuple, kwargs: dict) -> Any:
        """Calls a 3x3 convolution, or SlimConv instead."""
        path, settings = conv.path, self.slimified
        if settings.where is not None and not settings.where(path, conv):
            self.not_chosen.append(path)
            return method(*args, **kwargs)
        inputs = kwargs["inputs"] if "inputs" in kwargs else args[0]
        norm = norm_settings(settings)
        try:
            if type(conv) is not nn.Conv:
                raise InputError(f"it is a {type(conv).__name__}, not an nn.Conv itself")
            if self.wrapper:
                raise InputError(f"it is in a {self.wrapper}, which changes its parameters")
            build, outline = replacement_of(conv, inputs, settings.reduction, norm)
        except InputError as error:
            self.left[path] = str(error)
            return method(*args, **kwargs)
        counts = count_conv_params(conv, inputs.shape[-1]), count_params(outline)
        self.replaced[path] = Replacement(inputs.shape[-1], conv.features, counts, None)
        train = settings.train if told.value is None else not told.value
        if train is None and not conv.is_initializing():
            raise InputError(
                f"it is unknown whether the SlimConv that replaces {name_of_path(path)} is "
                "training: use linen.slimify(module, train=...) or slim.clone(train=...)"
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
    """Replaces the 3x3 convolutions of a Linen network by SlimConv.

        slim = slimconv_jax.linen.slimify(ResNet50(num_classes=10))
        print(slim.report(images))
        variables = slim.init(key, images)

    The replacements are those of `slimconv_jax.slimify`, which also leaves the same convolutions
    unchanged. The rest of the network does not change, and its variables keep their paths. The new
    batch norms follow the mode that calls of the modules around them have as an argument (`train`,
    `deterministic`, ...).

    Args:
      module: any network, unbound.
      k: compression ratio of SlimConv, 2r/3 for an integer r >= 2.
      where: `where(path, conv)` says whether to replace a 3x3 convolution; the path has the names
        that lead to it, such as ("Block_0", "Conv_1"). None replaces all.
      momentum: of the new batch norms; for this and the next two see `slimconv_jax.SlimConv`.
      epsilon: of the new batch norms.
      axis_name: of the new batch norms; required if those of the network have one.
      train: the mode, if the calls do not have it as an argument.

    Raises:
      ValueError: if `k` is not a compression ratio, or the module is not a Linen module.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"linen.slimify takes a Linen module, not a {type(module).__name__}")
    if where is not None and not callable(where):
        raise InputError(f"slimify: where={where!r} must be a function of a path and a convolution")
    return Slimified(module, reduction_from_k(k), where, momentum, epsilon, axis_name, train)
