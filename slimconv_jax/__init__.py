"""SlimConv and the Sc-ResNet family in Flax."""

from slimconv_jax import linen
from slimconv_jax.models.complexity import count_macs, count_params
from slimconv_jax.models.slimconv import SlimConv
from slimconv_jax.models.slimify import slimify
from slimconv_jax.models.surgery import backbone, fold_batch_norm
from slimconv_jax.models.zoo import create_model, list_models
from slimconv_jax.saving import load_model, save_model
from slimconv_jax.torch_interop.convert import from_torch, to_torch

__all__ = [
    "SlimConv",
    "backbone",
    "count_macs",
    "count_params",
    "create_model",
    "fold_batch_norm",
    "from_torch",
    "linen",
    "list_models",
    "load_model",
    "save_model",
    "slimify",
    "to_torch",
]
