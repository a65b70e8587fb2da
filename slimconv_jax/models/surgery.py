"""Changes to existing models: folds batch norm, extracts backbones.

Each function returns a new model and does not change its argument.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.models.layers import ConvBN
from slimconv_jax.models.projected import ProjectedSlimConv
from slimconv_jax.models.resnet import STEMS, ResNet
from slimconv_jax.models.slimconv import Gate
from slimconv_jax.models.zoo import abstract_resnet, require_module, require_resnet

Path = tuple[str | int, ...]


def fold_batch_norm(model: nnx.Module) -> nnx.Module:
    """Folds the batch norms of this package's modules into the layers before them.

    In evaluation mode the result computes the same function; results differ by rounding only. Each
    batch norm with its running statistics is a scale and an offset per channel: the scale goes into
    the kernel of the convolution before it (in SlimConv's gate, of the linear layer), and the
    offset becomes its bias.

    Args:
      model: any NNX module; it is not changed. Only the batch norms of this package's ResNets and
        SlimConvs are folded.

    Returns:
      A model for inference, whose folded kernels have the dtype that they are computed in: for
      bfloat16, half the bytes to read. It cannot be trained further, or saved by `save_model`.

    Raises:
      ValueError: if there is nothing to fold, or the parameters have no values, as inside of
        `jax.jit` or `nnx.eval_shape`.
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
            node.remat = False  # it is for training
        if type(node) is ConvBN:
            bn, node = node.bn, nnx.clone(node.conv)  # others may use the convolution, too
            _absorb(node.project if isinstance(node, ProjectedSlimConv) else node, bn)
        elif type(node) is Gate and isinstance(node.bn, nnx.BatchNorm):
            node.squeeze = nnx.clone(node.squeeze)
            _absorb(node.squeeze, node.bn)
            node.bn = nnx.static(nnx.identity)
        else:
            return node
        folded_any = True
        return node

    folded = map_modules(fold, nnx.clone(model), "fold_batch_norm")
    if not folded_any:
        raise InputError("fold_batch_norm: the model has no batch norm of a ResNet or SlimConv")
    folded.eval()
    return folded


def _absorb(layer: nnx.Conv | nnx.Linear, bn: nnx.BatchNorm) -> None:
    """Changes a layer to compute what it and the batch norm after it compute."""
    mean, var, scale, offset, kernel = (
        np.asarray(variable[...], np.float64)
        for variable in (bn.mean, bn.var, bn.scale, bn.bias, layer.kernel)
    )
    bias = 0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    scale = scale / np.sqrt(var + bn.epsilon)
    dtype = jax.dtypes.canonicalize_dtype(layer.dtype or layer.kernel.dtype)
    # Leading axes before those of one layer come from `nnx.vmap`.
    inner = (1,) * (kernel.ndim - scale.ndim)
    kernel = kernel * scale.reshape(*scale.shape[:-1], *inner, scale.shape[-1])
    layer.kernel.set_value(jnp.asarray(kernel, dtype))
    layer.bias = nnx.Param(jnp.asarray((bias - mean) * scale + offset, dtype))
    layer.use_bias = True


def backbone(model: ResNet, *, output_stride: int | None = None) -> ResNet:
    """Returns a ResNet without its classifier, for feature maps, with the same weights.

    If the output stride is less than the model's, the strides of the last stages become dilation,
    as in DeepLab: on the larger maps each weight of a convolution then sees the same pixels as
    before, so that the weights stay valid. (A gate of SlimConv averages over the larger map.)

    Args:
      model: a ResNet of this package; it is not changed.
      output_stride: stride of the last feature map: 32, 16, 8 or 4, with the "cifar" stem 8, 4, 2
        or 1. None leaves strides and dilation as they are.

    Returns:
      A ResNet of `num_classes=0`: a call returns pooled features (N, C). It is in evaluation mode
      if the model is.

    Raises:
      ValueError: if the model is not such a ResNet, or the output stride is not one of those.
    """
    require_resnet(model, "backbone")
    dilation = model.config.dilation
    if output_stride is not None:
        first = STEMS[model.config.stem]
        # The output strides, and how many of the last three stages have dilation.
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
    nnx.update(result, nnx.state(weights))
    if is_evaluating(model):
        result.eval()
    return result


def map_modules(function: Callable[[Path, Any], Any], model: nnx.Module, caller: str) -> nnx.Module:
    """Calls `nnx.recursive_map`, and raises an InputError if it cannot change the model."""
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


def is_evaluating(model: nnx.Module) -> bool:
    """Returns whether a model has parts with an evaluation mode, all of which are in it."""
    modes = [
        getattr(module, name)
        for _, module in nnx.iter_modules(model)
        for name, kind in (("use_running_average", nnx.BatchNorm), ("deterministic", nnx.Dropout))
        if isinstance(module, kind)
    ]
    return bool(modes) and all(modes)
