"""SlimConv and the Sc-ResNet family in Flax."""

from slimconv_jax.models.complexity import count_macs, count_params
from slimconv_jax.models.slimconv import SlimConv
from slimconv_jax.models.zoo import create_model, list_models
from slimconv_jax.saving import load_model, save_model
from slimconv_jax.torch_interop.convert import from_torch, to_torch

__all__ = [
    "SlimConv",
    "count_macs",
    "count_params",
    "create_model",
    "from_torch",
    "list_models",
    "load_model",
    "save_model",
    "to_torch",
]
