"""The names in PyTorch state dicts beside ours: `CONVENTIONS` is the one table of them.

A row is the name of a layer in a state dict and its name here. To read another convention, add its
rows: a checkpoint whose stem is called `stem.conv` needs `("stem.conv", "stem.conv")`. Of several
rows with the same name here, the first has the released name, which `to_torch` writes and error
messages use.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

import numpy as np
from flax import nnx

from slimconv_jax.models.resnet import ResNet
from slimconv_jax.models.variables import by_name

CONVENTIONS = (
    # torchvision's and timm's ResNets.
    ("conv1", "stem.conv"),
    ("bn1", "stem.bn"),
    ("layer{layer}.{i}.conv{n}", "stages.{stage}.{i}.conv{n}.conv"),
    ("layer{layer}.{i}.bn{n}", "stages.{stage}.{i}.conv{n}.bn"),
    ("layer{layer}.{i}.downsample.0", "stages.{stage}.{i}.shortcut.conv"),
    ("layer{layer}.{i}.downsample.1", "stages.{stage}.{i}.shortcut.bn"),
    ("fc", "classifier"),
    # The SlimConv of the authors.
    ("layer{layer}.{i}.conv2.fc.0", "stages.{stage}.{i}.conv2.gate.squeeze"),
    ("layer{layer}.{i}.conv2.fc.1", "stages.{stage}.{i}.conv2.gate.bn"),
    ("layer{layer}.{i}.conv2.fc.3", "stages.{stage}.{i}.conv2.gate.excite"),
    ("layer{layer}.{i}.conv2.conv2_1.0", "stages.{stage}.{i}.conv2.upper.conv"),
    ("layer{layer}.{i}.conv2.conv2_1.1", "stages.{stage}.{i}.conv2.upper.bn"),
    ("layer{layer}.{i}.conv2.conv2_2.0", "stages.{stage}.{i}.conv2.lower_reduce.conv"),
    ("layer{layer}.{i}.conv2.conv2_2.1", "stages.{stage}.{i}.conv2.lower_reduce.bn"),
    ("layer{layer}.{i}.conv2.conv2_2.3", "stages.{stage}.{i}.conv2.lower.conv"),
    ("layer{layer}.{i}.conv2.conv2_2.4", "stages.{stage}.{i}.conv2.lower.bn"),
    # timm's squeeze-and-excitation.
    ("layer{layer}.{i}.se.fc1", "stages.{stage}.{i}.se.squeeze"),
    ("layer{layer}.{i}.se.fc2", "stages.{stage}.{i}.se.excite"),
    # The ghost modules of GhostNet.
    ("layer{layer}.{i}.conv{n}.primary_conv.0", "stages.{stage}.{i}.conv{n}.primary.conv"),
    ("layer{layer}.{i}.conv{n}.primary_conv.1", "stages.{stage}.{i}.conv{n}.primary.bn"),
    ("layer{layer}.{i}.conv{n}.cheap_operation.0", "stages.{stage}.{i}.conv{n}.cheap.conv"),
    ("layer{layer}.{i}.conv{n}.cheap_operation.1", "stages.{stage}.{i}.conv{n}.cheap.bn"),
    ("layer{layer}.{i}.downsample.primary_conv.0", "stages.{stage}.{i}.shortcut.primary.conv"),
    ("layer{layer}.{i}.downsample.primary_conv.1", "stages.{stage}.{i}.shortcut.primary.bn"),
    ("layer{layer}.{i}.downsample.cheap_operation.0", "stages.{stage}.{i}.shortcut.cheap.conv"),
    ("layer{layer}.{i}.downsample.cheap_operation.1", "stages.{stage}.{i}.shortcut.cheap.bn"),
    # What PyTorch's wrappers put in front of the names of what they wrap, or inside them.
    ("module", ""),
    ("base_layer", ""),
    ("_orig_mod", ""),
    ("_forward_module", ""),
    ("_wrapped_module", ""),
    ("_checkpoint_wrapped_module", ""),
    ("_fpw_module", ""),
    ("_fsdp_wrapped_module", ""),
)
"""Names of layers: theirs and ours. `{stage}` counts from 0, and `{layer}` is the stage from 1."""

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
"""Our names of the variables in a layer, and theirs."""

_NUMBERS = {"stage": "[0-3]", "layer": "[1-4]", "i": r"\d+", "n": "[1-3]"}
_GROUPS = {name: f"(?P<{name}>{number})" for name, number in _NUMBERS.items()}

_wrappers = "|".join(theirs for theirs, ours in CONVENTIONS if not ours)
WRAPPERS = re.compile(rf"(?:^|(?<=\.))(?:{_wrappers})\.")
"""Matches the names of wrappers in a name."""

_starts = {theirs.partition("{i}")[0] + "{i}" for theirs, _ in CONVENTIONS if "{i}" in theirs}
_blocks = "|".join(_starts).replace(".", r"\.").format(**_NUMBERS)
IN_BLOCK = re.compile(rf"(.*\.|)((?:{_blocks})\..+)")
"""Matches the name of an entry of a block; groups: the prefix of the network, and the rest."""


def released_name(name: str) -> str:
    """Returns the released name of an entry, given its name in any convention.

    Names that are not in the table are returned as they are.
    """
    layer, _, leaf = name.rpartition(".")
    ours = _translate(layer, CONVENTIONS)
    return f"{_released(ours)}.{leaf}" if ours else name


def _released(ours: str) -> str | None:
    """Returns the released name of one of our layers."""
    return _translate(ours, ((ours, theirs) for theirs, ours in CONVENTIONS))


def _translate(layer: str, rows: Iterable[tuple[str, str]]) -> str | None:
    """Returns the other name in the first row that fits; None if no row does."""
    for name, other in rows:
        if match := _pattern(name).fullmatch(layer):
            numbers = match.groupdict()
            if "stage" in numbers:
                numbers["layer"] = int(numbers["stage"]) + 1
            elif "layer" in numbers:
                numbers["stage"] = int(numbers["layer"]) - 1
            return other.format(**numbers)
    return None


@functools.cache
def _pattern(name: str) -> re.Pattern:
    return re.compile(name.replace(".", r"\.").format(**_GROUPS))


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
        """Returns an array of PyTorch's layout, OIHW or (O, I), in ours, HWIO or (I, O)."""
        if len(self.variable.shape) == 4:
            return array.transpose(2, 3, 1, 0)
        # A linear layer; that of the gate is a 1x1 convolution in PyTorch.
        return array.reshape(array.shape[:2]).T if array.ndim > 1 else array

    def to_torch(self) -> np.ndarray:
        """Returns the values of the variable in PyTorch's layout."""
        array = np.asarray(self.variable[...])
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        # Always a copy: the array may be the model's own memory.
        return np.array(array.reshape(self.shape), order="C")


def entries(model: ResNet) -> dict[str, Entry]:
    """Returns every parameter and batch statistic of a model, by released name, in our order."""
    table = {}
    for ours, variable in by_name(model).items():
        layer, _, leaf = ours.rpartition(".")
        name = f"{_released(layer)}.{LEAVES[leaf]}"
        shape = variable.shape[::-1]
        if len(shape) == 4:
            shape = (*shape[:2], *variable.shape[:2])
        elif len(shape) == 2 and layer != "classifier":
            shape = (*shape, 1, 1)
        table[name] = Entry(shape, variable)
    return table
