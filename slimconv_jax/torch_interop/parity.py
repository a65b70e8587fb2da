"""Compares what a model computes with the PyTorch network of the same state dict."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slimconv_jax.models.resnet import ResNet
from slimconv_jax.torch_interop import import_torch

DEFAULT_TOLERANCE = 1e-4
"""For float32, whose rounding causes errors of 1e-6 in networks that do not amplify it.

In float64, where rounding is negligible, a ten thousandth of a tolerance is allowed.
"""


@dataclasses.dataclass(frozen=True)
class StageParity:
    """The difference between two outputs of one stage.

    Attributes:
      stage: "stem" (before the pool), "stage 1" to "stage 4", or "logits".
      shape: the shape of the output for one image, NHWC without the N.
      max_abs_error: the largest absolute difference of two elements, where both are finite.
      max_rel_error: the same, divided by the largest absolute value of the reference.
      finite: fraction of the elements that are finite in the reference.
      same_finite: whether the same elements are finite in both.
    """

    stage: str
    shape: tuple[int, ...]
    max_abs_error: float
    max_rel_error: float
    finite: float
    same_finite: bool


@dataclasses.dataclass(frozen=True)
class Parity:
    """The result of a comparison with PyTorch.

    Attributes:
      stages: from the stem to the logits.
      top1_agreement: fraction of the images that both put into the same class; where logits
        are not finite they do not count as the same.
      images: how many images were compared.
      image_size: their height and width in pixels.
      dtype: "float32" or "float64".
      torch: the version of PyTorch.
    """

    stages: tuple[StageParity, ...]
    top1_agreement: float
    images: int
    image_size: int
    dtype: str
    torch: str

    def first_difference(self, tolerance: float) -> StageParity | None:
        """Returns the first stage whose relative error is not within the tolerance."""
        different = (s for s in self.stages if not (s.same_finite and s.max_rel_error <= tolerance))
        return next(different, None)


def check_parity(
    model: ResNet,
    state_dict: Mapping[str, np.ndarray],
    images: np.ndarray,
    *,
    batch_size: int = 8,
) -> Parity:
    """Runs a model and the PyTorch reference on the same images, in evaluation mode.

    The reference (`torch_interop.reference`) loads the state dict on its own, strictly. Both
    compute in the dtype of the images, float32 or (with `jax_enable_x64`) float64,
    on accelerators at full precision.

    Args:
      model: from `from_torch(state_dict)`, without a `dtype` of its own.
      state_dict: from `clean_state_dict`.
      images: (N, H, W, 3), normalised.
      batch_size: images computed at once.

    Raises:
      ValueError: if PyTorch is not installed.
    """
    torch = import_torch()
    from slimconv_jax.torch_interop.reference import ResNet as Reference

    with torch.device("meta"):
        reference = Reference(model.config)
    tensors = {
        name: torch.from_numpy(np.array(array, images.dtype)) for name, array in state_dict.items()
    }
    for name in reference.state_dict():
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(0)
    reference.load_state_dict(tensors, strict=True, assign=True)
    reference.eval()

    graphdef, state = nnx.split(nnx.view(model, use_running_average=True))
    state = jax.tree.map(lambda array: jnp.asarray(array, images.dtype), state)
    batch_size = min(batch_size, len(images))
    measured: dict[str, list[tuple]] = {}
    agreeing = 0
    for start in range(0, len(images), batch_size):
        count = min(batch_size, len(images) - start)
        # The last batch is filled up: another size would be compiled anew.
        batch = np.resize(images[start : start + count], (batch_size, *images.shape[1:]))
        with torch.inference_mode():
            theirs = reference.activations(torch.from_numpy(batch).permute(0, 3, 1, 2))
        with jax.default_matmul_precision("highest"):
            ours = _activations(graphdef, state, jnp.asarray(batch))
        for stage, expected in theirs.items():
            expected = expected.permute(0, 2, 3, 1) if expected.ndim == 4 else expected
            pair = np.asarray(ours[stage])[:count], expected.numpy()[:count]
            measured.setdefault(stage, []).append(_measure(*pair))
        finite = np.isfinite(pair).all(axis=(0, -1))
        classes, expected_classes = (logits.argmax(axis=-1) for logits in pair)
        agreeing += int((finite & (classes == expected_classes)).sum())
    return Parity(
        stages=tuple(_stage(name, ours[name].shape[1:], parts) for name, parts in measured.items()),
        top1_agreement=agreeing / len(images),
        images=len(images),
        image_size=images.shape[1],
        dtype=str(images.dtype),
        torch=torch.__version__,
    )


@functools.partial(jax.jit, static_argnums=0)
def _activations(
    graphdef: nnx.GraphDef, state: nnx.State, images: jax.Array
) -> dict[str, jax.Array]:
    """Computes the outputs of the stages, by the names that the reference gives them."""
    model = nnx.merge(graphdef, state)
    maps = model.features(images)
    stages = {f"stage {number}": x for number, x in enumerate(maps, start=1)}
    return {"stem": nnx.relu(model.stem(images)), **stages, "logits": model.head(maps[-1])}


class _Measured(NamedTuple):
    """The errors of one stage on one batch, and how much there was to compare."""

    max_abs_error: float
    max_abs_expected: float
    finite: int
    size: int
    same_finite: bool


def _measure(output: np.ndarray, expected: np.ndarray) -> _Measured:
    output, expected = output.astype(np.float64), expected.astype(np.float64)
    finite, both = np.isfinite(expected), np.isfinite(expected) & np.isfinite(output)
    return _Measured(
        max_abs_error=float(np.abs(output[both] - expected[both]).max(initial=0.0)),
        max_abs_expected=float(np.abs(expected[finite]).max(initial=0.0)),
        finite=int(finite.sum()),
        size=finite.size,
        same_finite=bool((finite == np.isfinite(output)).all()),
    )


def _stage(name: str, shape: tuple[int, ...], parts: list[_Measured]) -> StageParity:
    max_abs_error = max(part.max_abs_error for part in parts)
    max_abs_expected = max(part.max_abs_expected for part in parts)
    if max_abs_expected:
        max_rel_error = max_abs_error / max_abs_expected
    else:  # the reference is 0 throughout
        max_rel_error = math.inf if max_abs_error else 0.0
    return StageParity(
        stage=name,
        shape=shape,
        max_abs_error=max_abs_error,
        max_rel_error=max_rel_error,
        finite=sum(part.finite for part in parts) / sum(part.size for part in parts),
        same_finite=all(part.same_finite for part in parts),
    )
