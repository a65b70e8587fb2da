"""SlimConv in place of the 3x3 convolutions of any NNX model."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
from flax import nnx

from slimconv_jax.errors import InputError, InputWarning
from slimconv_jax.models.complexity import Layer, as_image_shape, count_params, layers
from slimconv_jax.models.layers import ConvBN
from slimconv_jax.models.mode import is_telling, mode_arguments, telling
from slimconv_jax.models.projected import ProjectedSlimConv, replacement
from slimconv_jax.models.resnet import Bottleneck, ResNet
from slimconv_jax.models.slimconv import (
    CompressionRatio,
    SlimConv,
    k_from_reduction,
    reduction_from_k,
)
from slimconv_jax.models.surgery import is_evaluating, map_modules
from slimconv_jax.models.timing import time_steps
from slimconv_jax.models.zoo import require_module

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A convolution that SlimConv took the place of.

    Attributes:
      in_features: its channels.
      out_features: the channels of its output.
      params: parameters before and after.
      macs: multiply-adds of one image before and after; None if they were not counted.
    """

    in_features: int
    out_features: int
    params: tuple[int, int]
    macs: tuple[int, int] | None

    def __str__(self) -> str:
        words = [f"{self.in_features} -> {self.out_features} channels"]
        words.append("parameters {:,} -> {:,}".format(*self.params))
        if self.macs is not None:
            words.append("multiply-adds {:,} -> {:,}".format(*self.macs))
        return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class SlimifyReport:
    """What `slimify` did; `print` shows it as a table.

    Attributes:
      k: the compression ratio of the new SlimConvs.
      replaced: the convolutions that were replaced, by path.
      left: the paths of those that could not be replaced, and the reasons.
      not_chosen: the paths of those that `where` did not choose.
      params: parameters of the model before and after.
      macs: multiply-adds of one image before and after; None if they were not counted.
      image_shape: (H, W, C) of that image.
      seconds: of a training step before and after; None if it was not measured.
      notes: what the user of the model has to know, in sentences.
    """

    k: Fraction
    replaced: dict[Path, Replacement]
    left: dict[Path, str]
    not_chosen: tuple[Path, ...]
    params: tuple[int, int]
    macs: tuple[int, int] | None
    image_shape: tuple[int, int, int]
    seconds: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = self.replaced | {path: f"left: {why}" for path, why in self.left.items()}
        names = {path: name_of_path(path) for path in rows}
        width = max(map(len, names.values()), default=0)
        counts = {"parameters": (*self.params, ",")}
        if self.macs is not None:
            image = "x".join(map(str, self.image_shape))
            counts[f"multiply-adds of an image of {image}"] = (*self.macs, ",")
        if self.seconds is not None:
            counts["seconds of a training step here"] = (*self.seconds, ".4f")
        return "\n".join(
            [
                f"{len(self.replaced)} of {len(rows) + len(self.not_chosen)} 3x3 convolutions "
                f"replaced, k={self.k}",
                *(f"  {names[path]:{width}}  {what}" for path, what in rows.items()),
                *(
                    f"{what}: {before:{form}} before, {after:{form}} after "
                    f"({after / before - 1:+.1%})"
                    for what, (before, after, form) in counts.items()
                ),
                *(f"note: {note}" for note in self.notes),
            ]
        )


def name_of_path(path: Path) -> str:
    """A path in words."""
    return ".".join(map(str, path)) or "the model itself"


def slimify(
    model: nnx.Module,
    *,
    k: CompressionRatio = "4/3",
    where: Callable[[Path, nnx.Conv], bool] | None = None,
    image_size: int | Sequence[int] | None = None,
    time: bool = False,
    rngs: nnx.Rngs | None = None,
) -> tuple[nnx.Module, SlimifyReport]:
    """Replaces the 3x3 convolutions of any NNX model by SlimConv.

    In place of an `nnx.Conv` from C to D channels comes SlimConv(C), ReLU and a 1x1 convolution to
    D channels, which restores the width, so that the rest of the model still fits: a
    `slimconv_jax.models.projected.ProjectedSlimConv`. SlimConv gets the strides, padding, dilation
    and groups, the 1x1 convolution the bias, with its values, both the dtypes, precision and
    sharding. The new batch norms have the momentum, epsilon and axis of devices that all batch
    norms of the model have. In the bottlenecks of this package's plain ResNets a 1x1 convolution
    follows anyway: there SlimConv replaces the convolution with its batch norm, and the model
    becomes exactly its Sc counterpart.
    What is new has new parameters; everything else is copied. A convolution in several places is
    replaced by one; those that share no more than a kernel become separate.

    The new batch norms are in the mode that `model.train()` and `model.eval()` set, and where a
    module that they are in is told its mode by an argument (`training`, `deterministic`, ...), in
    that one: such a module gets a class of the same name that passes it on. That is not so where
    the module's own batch norms do not hear the argument, which is then about something else.

    Args:
      model: any NNX module; it stays as it is. The convolutions inside a SlimConv do not count.
      k: compression ratio of SlimConv, 2r/3 for an integer r >= 2.
      where: `where(path, conv)` says whether to replace a 3x3 convolution; the path has
        the attribute names and indices that lead to it. None replaces all.
      image_size: pixels a side, or (H, W, C), of the image for which the report counts
        multiply-adds. None means 224x224x3, and no count if the model takes no such image.
      time: whether to compile and time a training step of both models, on eight such images.
      rngs: source of the new parameters; `nnx.Rngs(0)` if None.

    Returns:
      The new model and a report. Left as they are, and listed in the report, are convolutions with
      too few channels, with channels that do not divide by the groups, with something that SlimConv
      has not, and those for which SlimConv would have more parameters or multiply-adds. The new
      layers are in evaluation mode if the batch norms and dropouts of the model are.

    Raises:
      ValueError: if `k` is none, the model has no 3x3 convolution, `where` chooses none, the
        model takes no image of the `image_size` (which None, too, does where it is to be timed),
        or no longer takes one with SlimConv in it, or it cannot be changed: Flax replaces no
        modules in tuples, and none in a model that contains itself.
    """
    reduction = reduction_from_k(k)
    require_module(model, "slimify")
    image_shape = as_image_shape(224 if image_size is None else image_size)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    if not hasattr(rngs, "params"):
        raise InputError(f"slimify: rngs must be nnx.Rngs, such as nnx.Rngs(0), not {rngs!r}")
    if where is not None and not callable(where):
        raise InputError(f"slimify: where={where!r} must be a function of a path and a convolution")
    evaluating = is_evaluating(model)
    norm, notes = _norm_settings(model)
    slim = nnx.clone(model)
    # Known by their kernels, since `recursive_map` copies modules, but not variables.
    wrapped = {
        kernel: type(wrapper).__name__
        for _, wrapper in nnx.iter_modules(slim)
        if isinstance(wrapper, nnx.WeightNorm | nnx.SpectralNorm)
        for kernel in _kernels(wrapper)
    }
    of_slimconvs, of_bottlenecks = (
        {
            kernel
            for _, unit in nnx.iter_modules(slim)
            if isinstance(unit, kind)
            for kernel in _kernels(unit)
        }
        for kind in (SlimConv, Bottleneck)
    )
    replaced, left, not_chosen = {}, {}, []

    def replace(path: Path, node: Any) -> Any:
        """Is called with the parts of a module before the module itself."""
        if isinstance(node, nnx.Conv) and node.kernel_size == (3, 3):
            if id(node.kernel) in of_slimconvs:
                return node
            if where is not None and not where(path, node):
                not_chosen.append(path)
                return node
            try:
                if wrapper := wrapped.get(id(node.kernel)):
                    raise InputError(f"it is in a {wrapper}, which changes its parameters")
                slim_node = _slim(
                    node, reduction, rngs, norm, may_grow=id(node.kernel) in of_bottlenecks
                )
            except InputError as error:
                left[path] = str(error)
                return node
            replaced[path] = (node, slim_node, path)
            if evaluating:
                slim_node.eval()
            return slim_node
        if type(node) is Bottleneck and _use_following_conv(node, rngs):
            conv, place = (*path, "conv2", "conv"), (*path, "conv2")
            replaced[conv] = (replaced[conv][0], node.conv2, place)
        regular = type(node) is ResNet and node.config.channels is None
        if regular and node.config.block == "bottleneck":
            units = [block.conv2 for stage in node.stages for block in stage]
            if all(isinstance(unit, SlimConv) and unit.reduction == reduction for unit in units):
                node.config = dataclasses.replace(node.config, reduction=reduction)
        return node

    slim = map_modules(replace, slim, "slimify")
    require_some(
        replaced, left, not_chosen, "the model has no nnx.Conv of 3x3 outside of SlimConvs"
    )
    rows = None
    try:
        rows = [layers(model, image_shape)]
    except InputError as error:
        if image_size is not None or time:
            raise
        notes.append(
            f"{error}; without an `image_size` that it takes, multiply-adds are not counted, and "
            "it is not known whether the new batch norms are told the mode of the model's own"
        )
    _pass_mode_on(slim, _rows_with_mode(model, rows[0]) if rows else ())
    if rows:
        try:
            rows.append(layers(slim, image_shape))
        except InputError as error:
            raise InputError(f"slimify: with SlimConv in it, {error}") from error
    report = SlimifyReport(
        k=k_from_reduction(reduction),
        replaced={
            path: Replacement(
                old.in_features,
                old.out_features,
                (count_params(old), count_params(new)),
                rows and (_macs(rows[0], path), _macs(rows[1], place)),
            )
            for path, (old, new, place) in replaced.items()
        },
        left=left,
        not_chosen=tuple(not_chosen),
        params=(count_params(model), count_params(slim)),
        macs=rows and tuple(part[0].macs for part in rows),
        image_shape=image_shape,
        seconds=time_steps((model, slim), image_shape) if time and replaced else None,
        notes=(*notes, *_notes(model, slim, replaced, rows and rows[1], time)),
    )
    return slim, report


def require_some(
    replaced: Mapping[Path, Any],
    left: Mapping[Path, str],
    not_chosen: Sequence[Path],
    there_is_none: str,
) -> None:
    """Makes sure that some convolution was replaced, or warns the caller's caller.

    Raises:
      ValueError: if there was nothing to replace.
    """
    if not replaced and not left:
        if not_chosen:
            there_is_none = (
                f"`where` chooses none of its {len(not_chosen)} 3x3 convolutions, such as "
                f"{not_chosen[0]}"
            )
        raise InputError(f"slimify: {there_is_none}")
    if not replaced:
        path, why = next(iter(left.items()))
        warnings.warn(
            f"slimify replaced nothing; {name_of_path(path)}, for one, is left: {why}",
            InputWarning,
            stacklevel=3,
        )


def _rows_with_mode(model: nnx.Module, rows: Sequence[Layer]) -> list[Layer]:
    """The calls of a model's batch norms, or, if it has none, of its dropouts."""
    for kind in (nnx.BatchNorm, nnx.Dropout):
        paths = {path for path, part in nnx.iter_modules(model) if isinstance(part, kind)}
        if chosen := [row for row in rows if row.path in paths]:
            return chosen
    return []


def _pass_mode_on(slim: nnx.Module, rows: Sequence[Layer]) -> None:
    """Lets the modules around new layers tell them the mode.

    Args:
      slim: the model with the new layers.
      rows: the calls of what has a mode in the model without them.
    """
    for path, module in nnx.iter_modules(slim):
        teller = telling(type(module))
        if teller is type(module) or isinstance(module, ProjectedSlimConv):
            continue
        parts = (part for _, part in nnx.iter_modules(module))
        if not any(isinstance(part, ProjectedSlimConv) for part in parts):
            continue
        inside = [row for row in rows if row.path[: len(path)] == path] or rows
        if not inside or any(row.told is not None for row in inside):
            object.__setattr__(module, "__class__", teller)


def _kernels(module: nnx.Module) -> list[int]:
    """The identities of the kernels of all convolutions in a module."""
    return [id(m.kernel) for _, m in nnx.iter_modules(module) if isinstance(m, nnx.Conv)]


def _norm_settings(model: nnx.Module) -> tuple[dict[str, Any], list[str]]:
    """What all batch norms of a model have, and a sentence about each setting that differs."""
    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.BatchNorm)]
    settings, notes = {}, []
    for name in ("momentum", "epsilon", "axis_name", "axis_index_groups"):
        values = [getattr(norm, name) for norm in norms]
        if different := [value for value in values if value != values[0]]:
            notes.append(
                f"the batch norms of the model differ in {name}, such as {values[0]!r} and "
                f"{different[0]!r}; the new ones have SlimConv's own"
            )
        elif values:
            settings[name] = values[0]
    return settings, notes


def _slim(
    conv: nnx.Conv,
    reduction: int,
    rngs: nnx.Rngs,
    norm: Mapping[str, Any],
    *,
    may_grow: bool,
) -> ProjectedSlimConv:
    """What takes the place of a convolution.

    Raises:
      ValueError: if there can be nothing; the message says why.
    """
    if type(conv) is not nnx.Conv:
        raise InputError(f"it is a {type(conv).__name__}, not an nnx.Conv itself")
    if conv.kernel.shape != conv.kernel_shape:
        raise InputError("it has parameters of several layers, which SlimConv has not")
    sharding = {
        f"{name}_metadata": _sharding(variable)
        for name, variable in (("kernel", conv.kernel), ("bias", conv.bias))
        if variable is not None
    }
    try:
        module = replacement(
            conv,
            conv.in_features,
            conv.out_features,
            reduction=reduction,
            may_grow=may_grow,
            rngs=rngs,
            **sharding,
            **norm,
        )
    except ValueError as error:
        if isinstance(error, InputError) or not any(sharding.values()):
            raise
        reason = str(error).split("\n")[0]
        raise InputError(f"it has a sharding that SlimConv cannot have: {reason}") from None
    if conv.bias is not None:
        module.bias.set_value(conv.bias.get_value())
    return module


def _sharding(variable: nnx.Variable) -> dict[str, Any]:
    """The metadata of a variable that say how it lies on the devices."""
    names = ("out_sharding", "sharding_names", "sharding_rules", "mesh")
    metadata = variable.get_metadata()
    return {name: metadata[name] for name in names if metadata.get(name) is not None}


def _use_following_conv(block: Bottleneck, rngs: nnx.Rngs) -> bool:
    """Lets the 1x1 convolution that ends a bottleneck take the output of a new SlimConv.

    After the 3x3 convolution in it was replaced by SlimConv with a 1x1 convolution of its own.
    Returns whether there was such a one.
    """
    if not (isinstance(block.conv2, ConvBN) and isinstance(block.conv2.conv, ProjectedSlimConv)):
        return False
    block.conv2 = block.conv2.conv.slimconv
    old, dtype = block.conv3, block.conv3.conv.dtype
    block.conv3 = ConvBN(block.conv2.out_features, old.out_features, 1, dtype=dtype, rngs=rngs)
    block.conv3.bn = old.bn
    return True


def _macs(rows: Sequence[Layer], path: Path) -> int:
    """Multiply-adds of all calls of the module at a path."""
    return sum(row.macs for row in rows if row.path == path)


def _notes(
    model: nnx.Module,
    slim: nnx.Module,
    replaced: Mapping[Path, Any],
    rows: Sequence[Layer] | None,
    timed: bool,
) -> Iterator[str]:
    """What changes for the user of a model."""
    if not replaced:
        return
    tellers = {
        f"{type(module).__name__}({', '.join(mode_arguments(type(module).__call__))}=)"
        for _, module in nnx.iter_modules(slim)
        if is_telling(type(module))
    }
    if tellers:
        yield (
            f"the new batch norms follow the mode that calls of {', '.join(sorted(tellers))} tell"
        )
    hearing = [row for row in _rows_with_mode(model, rows or ()) if row.told is not None]
    new = [row for row in rows or () if row.type == ProjectedSlimConv.__name__]
    if hearing and (deaf := [row for row in new if row.told != hearing[0].told]):
        yield (
            f"{name_of_path(hearing[0].path)}, a {hearing[0].type}, is told its mode by the module "
            f"that calls it, and the new layer {name_of_path(deaf[0].path)} is not: it follows "
            "model.train() and model.eval(), to be called in addition"
        )
    if not jax.tree.leaves(nnx.state(model, nnx.BatchStat)):
        yield (
            "the model had no batch statistics and has some now: nnx.split(model, nnx.Param, ...) "
            "needs a place for nnx.BatchStat, a compiled step has to return them, model.train() "
            "and model.eval() matter, and weight decay should leave out scales and biases"
        )
    if rows and not timed:
        yield "multiply-adds are not time; slimify(..., time=True) measures a training step"
