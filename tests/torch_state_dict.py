"""State dicts with random values in all places, under the names that PyTorch gives them."""

import numpy as np
import torch

from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.torch_interop.reference import ResNet


def random_state_dict(
    config: ResNetConfig, dtype=np.float32, seed: int = 0
) -> dict[str, np.ndarray]:
    """Parameters and batch statistics of the PyTorch network, without its counters."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in ResNet(config).state_dict().items()}
    rng = np.random.default_rng(seed)
    values = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        if len(shape) > 1:
            value = rng.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[1:]))
        elif name.endswith(("weight", "running_var")):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(scale=0.3, size=shape)
        values[name] = value.astype(dtype)
    return values


def as_tensors(state_dict: dict[str, np.ndarray], prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: torch.from_numpy(np.array(a)) for name, a in state_dict.items()}
