"""SlimConv and the Sc-ResNet family in Flax."""

from slimconv_jax.models.complexity import count_macs, count_params
from slimconv_jax.models.slimconv import SlimConv
from slimconv_jax.models.zoo import create_model, list_models

__all__ = ["SlimConv", "count_macs", "count_params", "create_model", "list_models"]
