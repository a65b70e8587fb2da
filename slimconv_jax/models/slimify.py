"""Replaces the 3x3 convolutions of any NNX model by SlimConv."""

import dataclasses
import types
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
    """A convolution that SlimConv replaced.

    Attributes:
      in_features: its channels.
      out_features: the channels of its output.
      params: parameters before and after.
      macs: multiply-adds of one image before and after; None if not counted.
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
      macs: multiply-adds of one image before and after; None if not counted.
      image_shape: (H, W, C) of that image.
      seconds: of a training step before and after; None if not measured.
      notes: sentences with what the user of the model has to know.
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
        total = len(rows) + len(self.not_chosen)
        lines = [f"{len(self.replaced)} of {total} 3x3 convolutions replaced, k={self.k}"]
        lines += [f"  {names[path]:{width}}  {what}" for path, what in rows.items()]
        for what, (before, after, form) in counts.items():
            change = f"{after / before - 1:+.1%}"
            lines.append(f"{what}: {before:{form}} before, {after:{form}} after ({change})")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def name_of_path(path: Path) -> str:
    """Returns a path as it is shown to users."""
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

    An `nnx.Conv` from C to D channels becomes SlimConv(C), ReLU and a 1x1 convolution to D
    channels, which restores the width so that the rest of the model still fits: a
    `slimconv_jax.models.projected.ProjectedSlimConv`. SlimConv gets the strides, padding, dilation
    and groups; the 1x1 convolution gets the bias, with its values; both get the dtypes, precision
    and sharding. The new batch norms get the momentum, epsilon and device axis that all batch norms
    of the model share. In the bottlenecks of this package's plain ResNets a 1x1 convolution follows
    anyway: there SlimConv replaces the convolution with its batch norm, and the model becomes
    exactly its Sc counterpart.
    New layers have new parameters; everything else is copied. A convolution in several places is
    replaced by one; convolutions that only share a kernel become separate.

    The new batch norms follow `model.train()` and `model.eval()`. If the call of a module around
    them takes the mode as an argument (`training`, `deterministic`, ...), they follow that: the
    module gets a class of the same name that passes it on. The exception is a module whose own
    batch norms do not follow the argument, which then means something else.

    Args:
      model: any NNX module; it is not changed. The convolutions inside a SlimConv do not count.
      k: compression ratio of SlimConv, 2r/3 for an integer r >= 2.
      where: `where(path, conv)` says whether to replace a 3x3 convolution; the path has
        the attribute names and indices that lead to it. None replaces all.
      image_size: pixels a side, or (H, W, C), of the image for which the report counts
        multiply-adds. None means 224x224x3, without counts if the model does not take that.
      time: whether to compile and time a training step of both models, on eight such images.
      rngs: source of the new parameters; `nnx.Rngs(0)` if None.

    Returns:
      The new model and a report. The report lists the convolutions that are left unchanged: those
      with too few channels, with channels that do not divide by the groups, with a setting that
      SlimConv does not have, and those for which SlimConv would have as many or more parameters or
      multiply-adds. The new layers are in evaluation mode if the batch norms and dropouts of the
      model are.

    Raises:
      ValueError: if `k` is not a compression ratio, the model has no 3x3 convolution, `where`
        chooses none, the model does not take an image of the `image_size` (also if that is None
        and `time` is set), it no longer takes one with SlimConv in it, or Flax cannot change it,
        because it has modules in tuples or contains itself.
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
    wrapped = _kernels_in(slim, nnx.WeightNorm | nnx.SpectralNorm)
    of_slimconvs, of_bottlenecks = _kernels_in(slim, SlimConv), _kernels_in(slim, Bottleneck)
    options = {"reduction": reduction, "rngs": rngs, **norm}
    replaced, left, not_chosen = {}, {}, []

    def replace(path: Path, node: Any) -> Any:
        """Replaces a module, after the modules inside it."""
        if isinstance(node, nnx.Conv) and node.kernel_size == (3, 3):
            if id(node.kernel) in of_slimconvs:
                return node
            if where is not None and not where(path, node):
                not_chosen.append(path)
                return node
            try:
                if wrapper := wrapped.get(id(node.kernel)):
                    raise InputError(f"it is in a {wrapper}, which changes its parameters")
                slim_node = _slim(node, may_grow=id(node.kernel) in of_bottlenecks, **options)
            except InputError as error:
                left[path] = str(error)
                return node
            replaced[path] = (node, slim_node, path)
            if evaluating:
                slim_node.eval()
            return slim_node
        place = (*path, "conv2")
        conv = (*place, "conv")
        if type(node) is Bottleneck and isinstance(node.conv2, ConvBN) and conv in replaced:
            _use_following_conv(node, rngs)
            replaced[conv] = (replaced[conv][0], node.conv2, place)
        if type(node) is ResNet and node.config.channels is None:
            node.config = dataclasses.replace(node.config, **_slimconvs_of(node))
        return node

    slim = map_modules(replace, slim, "slimify")
    none_found = "the model has no nnx.Conv of 3x3 outside of SlimConvs"
    require_some(replaced, left, not_chosen, none_found)
    before = after = None
    try:
        before = layers(model, image_shape)
    except InputError as error:
        if image_size is not None or time:
            raise
        notes.append(
            f"{error}; without an `image_size` that it takes, multiply-adds are not counted, and "
            "it is unknown whether the new batch norms follow the mode of the model's own"
        )
    _pass_mode_on(slim, _rows_with_mode(model, before))
    if before:
        try:
            after = layers(slim, image_shape)
        except InputError as error:
            raise InputError(f"slimify: with SlimConv in it, {error}") from error
    report = SlimifyReport(
        k=k_from_reduction(reduction),
        replaced={
            path: Replacement(
                old.in_features,
                old.out_features,
                (count_params(old), count_params(new)),
                before and (_macs(before, path), _macs(after, place)),
            )
            for path, (old, new, place) in replaced.items()
        },
        left=left,
        not_chosen=tuple(not_chosen),
        params=(count_params(model), count_params(slim)),
        macs=before and (before[0].macs, after[0].macs),
        image_shape=image_shape,
        seconds=time_steps((model, slim), image_shape) if time and replaced else None,
        notes=(*notes, *_notes(model, slim, replaced, after, time)),
    )
    return slim, report


def require_some(
    replaced: Mapping[Path, Any],
    left: Mapping[Path, str],
    not_chosen: Sequence[Path],
    none_found: str,
) -> None:
    """Checks that a convolution was replaced, and otherwise warns the caller's caller.

    Raises:
      ValueError: if there was nothing to replace.
    """
    if not replaced and not left:
        if not_chosen:
            count, example = len(not_chosen), not_chosen[0]
            none_found = f"`where` chooses none of its {count} 3x3 convolutions, such as {example}"
        raise InputError(f"slimify: {none_found}")
    if not replaced:
        path, why = next(iter(left.items()))
        warnings.warn(
            f"slimify replaced nothing; {name_of_path(path)}, for one, is left: {why}",
            InputWarning,
            stacklevel=3,
        )


def _rows_with_mode(model: nnx.Module, rows: Sequence[Layer] | None) -> list[Layer]:
    """Returns the calls of a model's batch norms, or of its dropouts if it has no batch norm."""
    for kind in (nnx.BatchNorm, nnx.Dropout):
        paths = {path for path, part in nnx.iter_modules(model) if isinstance(part, kind)}
        if chosen := [row for row in rows or () if row.path in paths]:
            return chosen
    return []


def _pass_mode_on(slim: nnx.Module, rows: Sequence[Layer]) -> None:
    """Makes the modules around new layers pass their mode on to them.

    Args:
      slim: the model with the new layers.
      rows: the calls of the batch norms or dropouts of the model without them.
    """
    for path, module in nnx.iter_modules(slim):
        parts = (part for _, part in nnx.iter_modules(module) if part is not module)
        if not any(isinstance(part, ProjectedSlimConv) for part in parts):
            continue
        inside = [row for row in rows if row.path[: len(path)] == path] or rows
        if not inside or any(row.told is not None for row in inside):
            object.__setattr__(module, "__class__", telling(type(module)))


def _kernels_in(model: nnx.Module, kinds: type | types.UnionType) -> dict[int, str]:
    """Maps the kernel of each convolution inside modules of some kinds to the module's type name.

    Uses the identities of the kernels, since `recursive_map` copies modules, but not variables.
    """
    return {
        id(conv.kernel): type(outer).__name__
        for _, outer in nnx.iter_modules(model)
        if isinstance(outer, kinds)
        for _, conv in nnx.iter_modules(outer)
        if isinstance(conv, nnx.Conv)
    }


def _norm_settings(model: nnx.Module) -> tuple[dict[str, Any], list[str]]:
    """Returns the settings that all batch norms share, and a sentence on each that differs."""
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


def _slim(conv: nnx.Conv, **options) -> ProjectedSlimConv:
    """Builds the replacement for a convolution; `options` are those of `replacement`.

    Raises:
      ValueError: if no replacement exists; the message says why.
    """
    if type(conv) is not nnx.Conv:
        raise InputError(f"it is a {type(conv).__name__}, not an nnx.Conv itself")
    if conv.kernel.shape != conv.kernel_shape:
        raise InputError("it has parameters of several layers, which SlimConv does not have")
    sharding = {
        f"{name}_metadata": _sharding(variable)
        for name, variable in (("kernel", conv.kernel), ("bias", conv.bias))
        if variable is not None
    }
    try:
        module = replacement(conv, conv.in_features, conv.out_features, **sharding, **options)
    except ValueError as error:
        if isinstance(error, InputError) or not any(sharding.values()):
            raise
        reason = str(error).split("\n")[0]
        raise InputError(f"it has a sharding that SlimConv cannot have: {reason}") from None
    if conv.bias is not None:
        module.bias.set_value(conv.bias.get_value())
    return module


def _sharding(variable: nnx.Variable) -> dict[str, Any]:
    """Returns the metadata of a variable that describe its layout on the devices."""
    names = ("out_sharding", "sharding_names", "sharding_rules", "mesh")
    metadata = variable.get_metadata()
    return {name: metadata[name] for name in names if metadata.get(name) is not None}


def _slimconvs_of(net: ResNet) -> dict[str, Any]:
    """Returns the fields of a ResNet's config that its SlimConvs determine.

    Returns none if they are not all of one kind, in whole stages.
    """

    def kind(unit: nnx.Module) -> dict[str, Any] | None:
        if isinstance(unit, SlimConv):
            names = ("reduction", "squeeze_ratio", "min_squeezed", "gating")
            return {name: getattr(unit, name) for name in names}
        return None if isinstance(unit, ConvBN) and type(unit.conv) is nnx.Conv else {}

    stages = [[kind(block.conv2) for block in stage] for stage in net.stages]
    kinds = [kind for stage in stages for kind in stage if kind is not None]
    whole = all(kind == stage[0] for stage in stages for kind in stage)
    if not whole or not kinds or not kinds[0] or any(kind != kinds[0] for kind in kinds):
        return {}
    return kinds[0] | {"sc_stages": tuple(stage[0] is not None for stage in stages)}


def _use_following_conv(block: Bottleneck, rngs: nnx.Rngs) -> None:
    """Feeds a new SlimConv to the last convolution of a bottleneck instead of to one of its own.

    The last convolution gets as many inputs as SlimConv has outputs, and keeps its batch norm.
    """
    block.conv2 = block.conv2.conv.slimconv
    old, dtype = block.conv3, block.conv3.conv.dtype
    block.conv3 = ConvBN(block.conv2.out_features, old.out_features, 1, dtype=dtype, rngs=rngs)
    block.conv3.bn = old.bn


def _macs(rows: Sequence[Layer], path: Path) -> int:
    """Sums the multiply-adds of all calls of the module at a path."""
    return sum(row.macs for row in rows if row.path == path)


def _notes(
    model: nnx.Module,
    slim: nnx.Module,
    replaced: Mapping[Path, Any],
    rows: Sequence[Layer] | None,
    timed: bool,
) -> Iterator[str]:
    """Yields sentences on what changes for the user of a model."""
    if not replaced:
        return
    tellers = {
        f"{type(module).__name__}({', '.join(mode_arguments(type(module).__call__))}=)"
        for _, module in nnx.iter_modules(slim)
        if is_telling(type(module))
    }
    if tellers:
        yield f"the new batch norms follow the mode in calls of {', '.join(sorted(tellers))}"
    hearing = [row for row in _rows_with_mode(model, rows) if row.told is not None]
    new = [row for row in rows or () if row.type == ProjectedSlimConv.__name__]
    if hearing and (deaf := [row for row in new if row.told != hearing[0].told]):
        yield (
            f"{name_of_path(hearing[0].path)}, a {hearing[0].type}, gets its mode from the module "
            f"that calls it, and the new layer {name_of_path(deaf[0].path)} does not: it follows "
            "model.train() and model.eval(); call them, too"
        )
    if not jax.tree.leaves(nnx.state(model, nnx.BatchStat)):
        yield (
            "the model had no batch statistics and has some now: nnx.split(model, nnx.Param, ...) "
            "needs a place for nnx.BatchStat, a compiled step has to return them, model.train() "
            "and model.eval() matter, and weight decay should leave out scales and biases"
        )
    if rows and not timed:
        yield "multiply-adds are not time; slimify(..., time=True) measures a training step"
