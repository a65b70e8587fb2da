"""The released names beside ours: one table, from ours to theirs.

The released files use torchvision's names for a ResNet and those of the authors' SlimConv
inside a bottleneck's `conv2`; ghost modules have GhostNet's. An architecture of this package gives
the names and the shapes that its PyTorch state dict must have.
"""

import dataclasses
import re

import numpy as np
from flax import nnx

from slimconv_jax.models.resnet import ResNet
from slimconv_jax.models.variables import by_name

_MODULES = (
    (r"stem\.conv", "conv1"),
    (r"stem\.bn", "bn1"),
    (r"classifier", "fc"),
    (r"stages\.(\d+)\.(\d+)\.", lambda match: f"layer{int(match[1]) + 1}.{match[2]}."),
    (r"\bshortcut\.conv", "downsample.0"),
    (r"\bshortcut\.bn", "downsample.1"),
    (r"\bconv2\.gate\.squeeze", "conv2.fc.0"),
    (r"\bconv2\.gate\.bn", "conv2.fc.1"),
    (r"\bconv2\.gate\.excite", "conv2.fc.3"),
    (r"\bconv2\.upper\.conv", "conv2.conv2_1.0"),
    (r"\bconv2\.upper\.bn", "conv2.conv2_1.1"),
    (r"\bconv2\.lower_reduce\.conv", "conv2.conv2_2.0"),
    (r"\bconv2\.lower_reduce\.bn", "conv2.conv2_2.1"),
    (r"\bconv2\.lower\.conv", "conv2.conv2_2.3"),
    (r"\bconv2\.lower\.bn", "conv2.conv2_2.4"),
    (r"\bshortcut\.(?=primary|cheap)", "downsample."),
    (r"\bprimary\.conv", "primary_conv.0"),
    (r"\bprimary\.bn", "primary_conv.1"),
    (r"\bcheap\.conv", "cheap_operation.0"),
    (r"\bcheap\.bn", "cheap_operation.1"),
    (r"\bconv([123])\.conv$", r"conv\1"),
    (r"\bconv([123])\.bn$", r"bn\1"),
)
"""Patterns of our module paths, and the released module names; applied in this order."""

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a model and its counterpart in the PyTorch state dict.

    Attributes:
      shape: the shape in PyTorch.
      variable: ours; abstract if the model is.
    """

    shape: tuple[int, ...]
    variable: nnx.Variable

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """From PyTorch's layout, OIHW or (O, I), to ours, HWIO or (I, O)."""
        if len(self.variable.shape) == 4:
            return array.transpose(2, 3, 1, 0)
        # A linear layer; that of the gate is a 1x1 convolution over there.
        return array.reshape(array.shape[:2]).T if array.ndim > 1 else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """From our layout to PyTorch's."""
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        # Always a copy: the array may be the model's own memory.
        return np.array(array.reshape(self.shape), order="C")


def entries(model: ResNet) -> dict[str, Entry]:
    """Every parameter and batch statistic of a model, by released name, in our order."""
    table = {}
    for ours, variable in by_name(model).items():
        module, _, leaf = ours.rpartition(".")
        for pattern, replacement in _MODULES:
            module = re.sub(pattern, replacement, module)
        name, shape = f"{module}.{_LEAVES[leaf]}", variable.shape
        if len(shape) == 4:
            shape = (shape[3], shape[2], shape[0], shape[1])
        elif len(shape) == 2:
            shape = shape[::-1] if name == "fc.weight" else (*shape[::-1], 1, 1)
        table[name] = Entry(shape, variable)
    return table
