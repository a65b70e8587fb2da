"""Models changed after they were made: SlimConv put in, batch norm folded, backbones taken out.

Each function returns a new model and leaves the one that it is given as it is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes

from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.models.complexity import as_image_shape, count_macs, count_params
from slimconv_jax.models.layers import ConvBN, kaiming_normal
from slimconv_jax.models.operations import conv_general_dilated
from slimconv_jax.models.resnet import STEMS, Bottleneck, ResNet
from slimconv_jax.models.slimconv import (
    CompressionRatio,
    Gate,
    SlimConv,
    k_from_reduction,
    reduction_from_k,
)
from slimconv_jax.models.zoo import abstract_resnet, require_module, require_resnet

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class SlimifyReport:
    """What `slimify` did; `print` shows it as a table.

    Attributes:
      k: the compression ratio of the new SlimConvs.
      replaced: the paths of the 3x3 convolutions that were replaced, and their channels in words.
      left: the paths of those that could not be replaced, and the reasons.
      not_chosen: the paths of those that `where` did not choose.
      params: parameters of the model before and after.
      macs: multiply-adds of one image before and after; None if they were not counted.
      image_shape: (H, W, C) of that image.
    """

    k: Fraction
    replaced: dict[Path, str]
    left: dict[Path, str]
    not_chosen: tuple[Path, ...]
    params: tuple[int, int]
    macs: tuple[int, int] | None
    image_shape: tuple[int, int, int]

    def __str__(self) -> str:
        rows = self.replaced | {path: f"left: {why}" for path, why in self.left.items()}
        names = {path: ".".join(map(str, path)) or "the model itself" for path in rows}
        width = max(map(len, names.values()))
        counts = {"parameters": self.params}
        if self.macs is not None:
            counts["multiply-adds of an image of {}x{}x{}".format(*self.image_shape)] = self.macs
        return "\n".join(
            [
                f"{len(self.replaced)} of {len(rows) + len(self.not_chosen)} 3x3 convolutions "
                f"replaced, k={self.k}",
                *(f"  {names[path]:{width}}  {what}" for path, what in rows.items()),
                *(
                    f"{what}: {before:,} before, {after:,} after ({after / before - 1:+.1%})"
                    for what, (before, after) in counts.items()
                ),
            ]
        )


def slimify(
    model: nnx.Module,
    *,
    k: CompressionRatio = "4/3",
    where: Callable[[Path, nnx.Conv], bool] | None = None,
    image_size: int | Sequence[int] | None = None,
    rngs: nnx.Rngs | None = None,
) -> tuple[nnx.Module, SlimifyReport]:
    """Replaces the 3x3 convolutions of any NNX model by SlimConv.

    In place of an `nnx.Conv` from C to D channels comes `nnx.Sequential` of SlimConv(C), ReLU and
    a 1x1 convolution to D channels, which restores the width, so that the rest of the model still
    fits. SlimConv gets the strides, padding, dilation and groups, the 1x1 convolution the bias,
    both the dtype and precision. In the bottlenecks of this package's plain ResNets a 1x1
    convolution follows anyway: there SlimConv replaces the convolution with its batch norm, and
    the model becomes exactly its Sc counterpart. What is new has new parameters; everything else
    is copied. A convolution in several places is replaced by one; those that share no more than
    a kernel become separate.

    Args:
      model: any NNX module; it stays as it is. The convolutions inside a SlimConv do not count.
      k: compression ratio of SlimConv, 2r/3 for an integer r >= 2.
      where: `where(path, conv)` says whether to replace a 3x3 convolution; the path has
        the attribute names and indices that lead to it. None replaces all.
      image_size: pixels a side, or (H, W, C), of the image for which the report counts
        multiply-adds. None means 224x224x3, and no count if the model takes no such image.
      rngs: source of the new parameters; `nnx.Rngs(0)` if None.

    Returns:
      The new model and a report. Left as they are, and listed in the report, are convolutions with
      too few channels, with channels that do not divide by the groups, or with something that
      SlimConv has not. The new layers are in evaluation mode if the batch norms and dropouts of
      the model are.

    Raises:
      ValueError: if `k` is none, the model has no 3x3 convolution, `where` chooses none, the
        model takes no image of the `image_size`, or it cannot be changed: Flax replaces no
        modules in tuples, and none in a model that contains itself.
    """
    reduction = reduction_from_k(k)
    require_module(model, "slimify")
    image_shape = as_image_shape(224 if image_size is None else image_size)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    if where is not None and not callable(where):
        raise InputError(f"slimify: where={where!r} must be a function of a path and a convolution")
    evaluating = _is_evaluating(model)
    slim = nnx.clone(model)
    wrapped = {
        id(conv.kernel): type(wrapper).__name__
        for _, wrapper in nnx.iter_modules(slim)
        if isinstance(wrapper, nnx.WeightNorm | nnx.SpectralNorm)
        for _, conv in nnx.iter_modules(wrapper)
        if isinstance(conv, nnx.Conv)
    }
    # Known by their kernels, since `recursive_map` copies modules, but not variables.
    of_slimconvs = {
        id(conv.kernel)
        for _, unit in nnx.iter_modules(slim)
        if isinstance(unit, SlimConv)
        for _, conv in nnx.iter_modules(unit)
        if isinstance(conv, nnx.Conv)
    }
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
                slim_node = _slim(node, reduction, rngs)
            except InputError as error:
                left[path] = str(error)
                return node
            replaced[path] = f"{node.in_features} -> {node.out_features} channels"
            if evaluating:
                slim_node.eval()
            return slim_node
        if type(node) is Bottleneck:
            _use_following_conv(node, rngs)
        regular = type(node) is ResNet and node.config.channels is None
        if regular and node.config.block == "bottleneck":
            units = [block.conv2 for stage in node.stages for block in stage]
            if all(isinstance(unit, SlimConv) and unit.reduction == reduction for unit in units):
                node.config = dataclasses.replace(node.config, reduction=reduction)
        return node

    slim = _map(replace, slim, "slimify")
    if not replaced and not left:
        why = "the model has no nnx.Conv of 3x3 outside of SlimConvs"
        if not_chosen:
            why = (
                f"`where` chooses none of its {len(not_chosen)} 3x3 convolutions, such as "
                f"{not_chosen[0]}"
            )
        raise InputError(f"slimify: {why}")
    try:
        macs_before = count_macs(model, image_shape)
    except InputError:
        if image_size is not None:
            raise
        macs = None
    else:
        macs = macs_before, count_macs(slim, image_shape)
    params = count_params(model), count_params(slim)
    k = k_from_reduction(reduction)
    return slim, SlimifyReport(k, replaced, left, tuple(not_chosen), params, macs, image_shape)


def _slim(conv: nnx.Conv, reduction: int, rngs: nnx.Rngs) -> nnx.Sequential:
    """SlimConv, ReLU and a 1x1 convolution in place of a 3x3 convolution.

    Raises:
      ValueError: if there can be none; the message says why.
    """
    if type(conv) is not nnx.Conv:
        raise InputError(f"it is a {type(conv).__name__}, not an nnx.Conv itself")
    unusual = {
        "an input dilation": np.any(np.array(conv.input_dilation or 1) != 1),
        "a mask": conv.mask is not None,
        f"parameters of {jnp.dtype(conv.param_dtype)}": conv.param_dtype != jnp.float32,
        "parameters of several layers": conv.kernel.shape != conv.kernel_shape,
        "a sharding": conv.kernel.get_metadata().get("out_sharding") is not None,
        "its own promote_dtype": conv.promote_dtype is not dtypes.promote_dtype,
        "a preferred_element_type": conv.preferred_element_type is not None,
        "its own conv_general_dilated": conv.conv_general_dilated
        not in (jax.lax.conv_general_dilated, conv_general_dilated),
    }
    for what, is_so in unusual.items():
        if is_so:
            raise InputError(f"it has {what}, which SlimConv has not")
    unit = SlimConv(
        conv.in_features,
        reduction=reduction,
        strides=1 if conv.strides is None else conv.strides,
        kernel_dilation=1 if conv.kernel_dilation is None else conv.kernel_dilation,
        padding=conv.padding,
        feature_group_count=conv.feature_group_count,
        dtype=conv.dtype,
        rngs=rngs,
    )
    restore = nnx.Conv(
        unit.out_features,
        conv.out_features,
        (1, 1),
        use_bias=conv.use_bias,
        kernel_init=kaiming_normal,
        conv_general_dilated=conv_general_dilated,
        dtype=conv.dtype,
        rngs=rngs,
    )
    slim = nnx.Sequential(unit, nnx.relu, restore)
    for _, module in nnx.iter_modules(slim):
        if hasattr(module, "precision"):
            module.precision = conv.precision
    return slim


def _use_following_conv(block: Bottleneck, rngs: nnx.Rngs) -> None:
    """Lets the 1x1 convolution that ends a bottleneck take the output of a new SlimConv.

    After the 3x3 convolution in it was replaced by SlimConv with a 1x1 convolution of its own.
    """
    if isinstance(block.conv2, ConvBN) and isinstance(block.conv2.conv, nnx.Sequential):
        block.conv2 = block.conv2.conv.layers[0]
        old, dtype = block.conv3, block.conv3.conv.dtype
        block.conv3 = ConvBN(block.conv2.out_features, old.out_features, 1, dtype=dtype, rngs=rngs)
        block.conv3.bn = old.bn


def fold_batch_norm(model: nnx.Module) -> nnx.Module:
    """The same function in evaluation mode, without the batch norms of this package's modules.

    Each batch norm with its running statistics is a scale and an offset per channel: the scale
    goes into the kernel of the convolution before it, in SlimConv's gate of the linear layer, and
    the offset becomes its bias. Results differ by rounding only.

    Args:
      model: any NNX module; it stays as it is. What is folded is what this package has made:
        ResNets and SlimConvs. Batch norms elsewhere in it stay.

    Returns:
      A model for inference, whose folded kernels have the dtype that they are computed in: for
      bfloat16, half the bytes to read. It cannot be trained further, or saved by `save_model`.

    Raises:
      ValueError: if there is nothing to fold, or the model has no values, inside of `jax.jit` or
        `nnx.eval_shape`.
    """
    require_module(model, "fold_batch_norm")
    if any(
        isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct)
        for leaf in jax.tree.leaves(nnx.state(model))
    ):
        raise InputError(
            "fold_batch_norm needs the values of the parameters: call it outside of jit"
        )
    folded_any = False

    def fold(path: Path, node: Any) -> Any:
        nonlocal folded_any
        if type(node) is ResNet:
            node.remat = False  # which is for training
        if type(node) is ConvBN:
            bn, node = node.bn, nnx.clone(node.conv)  # others may use the convolution, too
            _absorb(node.layers[-1] if isinstance(node, nnx.Sequential) else node, bn)
        elif type(node) is Gate and isinstance(node.bn, nnx.BatchNorm):
            node.squeeze = nnx.clone(node.squeeze)
            _absorb(node.squeeze, node.bn)
            node.bn = nnx.static(nnx.identity)
        else:
            return node
        folded_any = True
        return node

    folded = _map(fold, nnx.clone(model), "fold_batch_norm")
    if not folded_any:
        raise InputError("fold_batch_norm: the model has no batch norm of a ResNet or SlimConv")
    folded.eval()
    return folded


def _absorb(layer: nnx.Conv | nnx.Linear, bn: nnx.BatchNorm) -> None:
    """Makes a layer compute what it and the batch norm after it compute."""
    mean, var, scale, offset, kernel = (
        np.asarray(variable[...], np.float64)
        for variable in (bn.mean, bn.var, bn.scale, bn.bias, layer.kernel)
    )
    bias = 0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    scale = scale / np.sqrt(var + bn.epsilon)
    dtype = jax.dtypes.canonicalize_dtype(layer.dtype or layer.kernel.dtype)
    # Axes before those of one layer are those of `nnx.vmap`.
    inner = (1,) * (kernel.ndim - scale.ndim)
    kernel = kernel * scale.reshape(*scale.shape[:-1], *inner, scale.shape[-1])
    layer.kernel.set_value(jnp.asarray(kernel, dtype))
    layer.bias = nnx.Param(jnp.asarray((bias - mean) * scale + offset, dtype))
    layer.use_bias = True


def backbone(model: ResNet, *, output_stride: int | None = None) -> ResNet:
    """A ResNet without its classifier, for feature maps, with the weights that it has.

    Where the output stride is less than the model's, the strides of the last stages become
    dilation, as in DeepLab: a convolution then meets the same pixels under its weights as
    before, on larger maps, so that the weights stay valid. (A gate of SlimConv averages over the
    larger map.)

    Args:
      model: a ResNet of this package; it stays as it is.
      output_stride: stride of the last feature map: 32, 16, 8 or 4, with the "cifar" stem 8, 4, 2
        or 1. None leaves strides and dilation as they are.

    Returns:
      A ResNet of `num_classes=0`: called, it gives pooled features (N, C). It is in evaluation
      mode if the model is.

    Raises:
      ValueError: if the model is none, or the output stride is not one of those.
    """
    require_resnet(model, "backbone")
    dilation = model.config.dilation
    if output_stride is not None:
        first = STEMS[model.config.stem]
        # How many of the last three stages have dilation.
        dilated = {first * 2 ** (3 - count): count for count in range(4)}
        require_integer("output_stride", output_stride, 1)
        if output_stride not in dilated:
            raise InputError(
                f"output_stride={output_stride!r} must be one of {', '.join(map(str, dilated))}"
            )
        dilation = tuple(stage >= 3 - dilated[output_stride] for stage in range(3))
    config = dataclasses.replace(model.config, num_classes=0, dilation=dilation)
    result = abstract_resnet(config, remat=model.remat, dtype=model.stem.conv.dtype)
    weights = nnx.clone(model)
    weights.classifier = None
    nnx.update(result, nnx.state(weights, (nnx.Param, nnx.BatchStat)))
    if _is_evaluating(model):
        result.eval()
    return result


def _map(function: Callable[[Path, Any], Any], model: nnx.Module, caller: str) -> nnx.Module:
    """`nnx.recursive_map`, with one sentence where it can do nothing."""
    try:
        return nnx.recursive_map(function, model)
    except ValueError as error:
        reason = str(error)
        if not ("Found cycle" in reason or "does not support mutation" in reason):
            raise
        raise InputError(
            f"{caller} cannot change a model with modules in tuples, or one that contains itself: "
            + reason.split("\n")[0]
        ) from None


def _is_evaluating(model: nnx.Module) -> bool:
    """Whether the parts of a model that have an evaluation mode, if there are any, are in it."""
    modes = [
        getattr(module, name)
        for _, module in nnx.iter_modules(model)
        for name, kind in (("use_running_average", nnx.BatchNorm), ("deterministic", nnx.Dropout))
        if isinstance(module, kind)
    ]
    return bool(modes) and all(modes)
