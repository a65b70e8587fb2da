"""SlimConv and the ResNets for Flax Linen code.

    model = slimconv_jax.linen.create_model("sc_resnet50", num_classes=10)
    variables = model.init(key, images)  # "params" and "batch_stats"
    logits = model.apply(variables, images)
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])

The modules compute what those of NNX compute, with variables of the same names, so that
`variables(nnx_model)` are theirs. `SlimmedConv` stands where `nn.Conv` stood, and `slimify` puts
SlimConv into a whole network.

`flax.nnx.bridge.ToLinen` is not used, since the integers in the paths of NNX lists become keys of
dicts there, which Linen's own tools (`flatten_dict(sep=...)`, say) do not take, and each `apply`
draws new initial values, which for a ResNet-50 takes ten seconds unless it is compiled.
"""

import collections
import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import unfreeze
from flax.linen import linear
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike

from slimconv_jax.errors import InputError
from slimconv_jax.models import resnet, slimconv
from slimconv_jax.models.complexity import count_params, count_program_macs
from slimconv_jax.models.layers import kaiming_normal, leave_devices
from slimconv_jax.models.mode import (
    arguments_for,
    attribute_mode,
    running_average,
    told,
    uses_running_average,
)
from slimconv_jax.models.projected import ProjectedSlimConv, count_conv_params, replacement
from slimconv_jax.models.slimconv import CompressionRatio, k_from_reduction, reduction_from_k
from slimconv_jax.models.slimify import Replacement, SlimifyReport, name_of_path, require_some
from slimconv_jax.models.zoo import abstract, abstract_resnet, require_module, resnet_config

_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def variables(model: nnx.Module) -> dict[str, Any]:
    """The variables of an NNX model for its Linen counterpart.

    Args:
      model: of this package, such as `load_model`, `from_torch` and `create_model` return.

    Returns:
      {"params": ..., "batch_stats": ...}, nested dicts with strings as keys.

    Raises:
      ValueError: if it is no NNX module.
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


def _run(
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


def _mode(module: nn.Module, train: bool | None) -> bool:
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


def _boxes(**initializers: Initializer) -> dict[str, nn.meta.AxisMetadata]:
    """What the initialisers of a "kernel" and a "bias" put their values in; see `_run`."""
    key, shapes = jax.random.key(0), {"kernel": (3, 3, 1, 1), "bias": (1,)}
    values = {
        name: jax.eval_shape(
            lambda key, name=name: initializers[name](key, shapes[name], jnp.float32), key
        )
        for name in initializers
    }
    return {n: value for n, value in values.items() if isinstance(value, nn.meta.AxisMetadata)}


def _unboxed(init: Initializer) -> Initializer:
    return lambda *args: nn.meta.unbox(init(*args))


class SlimConv(nn.Module):
    """`slimconv_jax.SlimConv` for Linen: the same unit, arguments and names.

    The channels C of the input are those that it is called with; it returns C // r + C // 2r.
    No activation: apply ReLU next.

    Attributes:
      k: see `slimconv_jax.SlimConv`, as for all others. A `kernel_init` of
        `nn.with_partitioning` is that of the three convolutions, too.
      train: whether batch norm uses and records the statistics of this batch, for which
        "batch_stats" must be mutable; to be given here or in the call, as the mode of
        `nn.BatchNorm`, but for `init`.
    """

    k: CompressionRatio | None = None
    reduction: int | None = None
    strides: int | Sequence[int] = 1
    kernel_dilation: int | Sequence[int] = 1
    padding: PaddingLike | None = None
    feature_group_count: int = 1
    lower_feature_group_count: int | None = None
    squeeze_ratio: int = 32
    kernel_init: Initializer = kaiming_normal
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    precision: PrecisionLike = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    train: bool | None = None

    def __call__(self, x: jax.Array, train: bool | None = None) -> jax.Array:
        """Maps (..., H, W, C) to (..., H', W', C // r + C // 2r).

        Args:
          x: the input.
          train: see the attribute.

        Raises:
          ValueError: as `slimconv_jax.SlimConv`, or if `train` is not given, or the variables are
            not those of the unit.
        """
        options = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("parent", "name", "train")
        }
        options["kernel_init"] = _unboxed(self.kernel_init)
        build = functools.partial(slimconv.SlimConv, x.shape[-1], **options)
        return _run(
            self,
            build,
            lambda: abstract(build),
            lambda unit: unit(x),
            _mode(self, train),
            _boxes(kernel=self.kernel_init),
        )


class SlimmedConv(nn.Conv):
    """`nn.Conv` with SlimConv inside: stands where a network takes a class of convolutions.

        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        conv = functools.partial(slimconv_jax.linen.SlimmedConv, k="4/3", train=train)

    A convolution of 3x3 becomes SlimConv, ReLU and a 1x1 convolution that restores the width. It
    stays a convolution, and so does every other one, where SlimConv cannot be or would be larger.

    Attributes:
      features: see `nn.Conv`, as for all others but these. In a SlimConv, the bias and its
        initialiser are those of the 1x1 convolution, and so is a `kernel_init` that is given.
      k: compression ratio, as the next ones see `slimconv_jax.SlimConv`.
      momentum: of the batch norms.
      epsilon: of the batch norms.
      axis_name: of the batch norms.
      train: see `SlimConv`; in a network of `slimify`, the mode that the network is told.
    """

    k: CompressionRatio = "4/3"
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    train: bool | None = None

    def __call__(self, inputs: jax.Array, train: bool | None = None) -> jax.Array:
        """Maps (..., H, W, C) to (..., H', W', features).

        Args:
          inputs: as of `nn.Conv`.
          train: see the attribute.

        Raises:
          ValueError: if k is none, or `train` is not given, or the variables are not those that
            there should be.
        """
        reduction = reduction_from_k(self.k)
        if _is_3x3(self):
            try:
                build, outline = _replacement(self, inputs, reduction, _norm(self))
            except InputError:
                pass
            else:
                return _run_slimmed(self, build, outline, inputs, _mode(self, train))
        return super().__call__(inputs)


def _norm(module: nn.Module) -> dict[str, Any]:
    """The settings of the batch norms that a module makes."""
    return {name: getattr(module, name) for name in ("momentum", "epsilon", "axis_name")}


def _is_3x3(conv: nn.Conv) -> bool:
    return not isinstance(conv.kernel_size, int) and tuple(conv.kernel_size) == (3, 3)


def _replacement(
    conv: nn.Conv, inputs: jax.Array, reduction: int, norm: dict[str, Any]
) -> tuple[Callable[..., ProjectedSlimConv], ProjectedSlimConv]:
    """What takes the place of a convolution: the function that makes it, and its outline.

    Raises:
      ValueError: if there is nothing; the message says why.
    """
    options = {"bias_init": _unboxed(conv.bias_init), **norm}
    if conv.kernel_init is not linear.default_kernel_init:
        options["project_init"] = _unboxed(conv.kernel_init)
    build = functools.partial(
        replacement, conv, inputs.shape[-1], conv.features, reduction=reduction, **options
    )
    return build, abstract(build)


def _run_slimmed(
    conv: nn.Conv,
    build: Callable[..., ProjectedSlimConv],
    outline: ProjectedSlimConv,
    inputs: jax.Array,
    train: bool,
) -> jax.Array:
    """The output of what takes the place of a convolution."""
    boxes = _boxes(kernel=conv.kernel_init, bias=conv.bias_init)
    return _run(conv, build, lambda: outline, lambda m: m(inputs), train, boxes)


class ResNet(nn.Module):
    """`slimconv_jax`'s ResNet for Linen; `create_model` makes the named ones.

    Attributes:
      config: the architecture.
      zero_init_residual: whether the last batch norm of each residual branch starts at scale 0.
      remat: whether training recomputes the insides of the blocks to save memory.
      dtype: dtype of the computation; parameters, batch statistics and logits are float32.
    """

    config: resnet.ResNetConfig
    zero_init_residual: bool = False
    remat: bool = False
    dtype: Dtype | None = None

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) of images (N, H, W, 3), float and normalised.

        Without classes, the pooled features (N, C).

        Args:
          x: the images.
          train: whether batch norm uses and records the statistics of this batch, for which
            "batch_stats" must be mutable.

        Raises:
          ValueError: if the variables are not those of the architecture.
        """
        return self._run(lambda model: model(x), train)

    def features(self, x: jax.Array, train: bool = False) -> list[jax.Array]:
        """The four feature maps of images: `model.apply(variables, x, method="features")`.

        Arguments and errors are those of a call.
        """
        return self._run(lambda model: model.features(x), train)

    def _run(self, forward: Callable[[resnet.ResNet], Any], train: bool) -> Any:
        options = {"remat": self.remat, "dtype": self.dtype}
        build = functools.partial(
            resnet.ResNet, self.config, zero_init_residual=self.zero_init_residual, **options
        )
        return _run(self, build, lambda: abstract_resnet(self.config, **options), forward, train)


def create_model(
    name: str,
    *,
    k: CompressionRatio | None = None,
    num_classes: int = 1000,
    stem: str = "imagenet",
    width: int = 64,
    dilation: Sequence[bool] = (False, False, False),
    zero_init_residual: bool = False,
    remat: bool = False,
    dtype: Dtype | None = None,
) -> ResNet:
    """A Linen module of a named architecture.

    Arguments and errors are those of `slimconv_jax.create_model`, but for `rngs`: `init` takes
    the key. It is `init`, too, that notices where a SlimConv of the architecture cannot exist.
    """
    config = resnet_config(
        name, k=k, num_classes=num_classes, stem=stem, width=width, dilation=dilation
    )
    return ResNet(config, zero_init_residual=zero_init_residual, remat=remat, dtype=dtype)


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
        found = _Found()

        def run(arrays: dict[int, jax.Array]) -> Any:
            args, kwargs = treedef.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])
            return self.module.init_with_output(jax.random.key(0), *args, **kwargs)

        def count() -> tuple[int, int]:
            jaxpr, (_, variables) = jax.make_jaxpr(run, return_shape=True)(arrays)
            return _count_params(variables["params"]), count_program_macs(jaxpr.jaxpr)

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
            image_shape=next((x.shape[1:] for x in arrays.values()), ()),
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
    return sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(tree))


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
    # Transforms of Flax call what is no attribute of the class.
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
            if isinstance(module, nn.Conv) and name == "__call__" and _is_3x3(module):
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
        build, outline = _replacement(conv, inputs, slimified.reduction, _norm(slimified))
    except InputError as error:
        found.left[path] = str(error)
        return method(*args, **kwargs)
    counts = count_conv_params(conv, inputs.shape[-1]), count_params(outline)
    found.replaced[path] = Replacement(inputs.shape[-1], conv.features, counts, None)
    train = slimified.train if told.value is None else not told.value
    if train is None and not conv.is_initializing():
        raise InputError(
            f"nothing tells the SlimConv in place of {name_of_path(path)} whether it is "
            "trained; linen.slimify(module, train=...) does, and so does slim.clone(train=...)"
        )
    return _run_slimmed(conv, build, outline, inputs, bool(train))


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
