"""Draws what is left out of the model in a training step: residual branches and features."""

import jax
import jax.numpy as jnp

from slimconv_jax.errors import require_number
from slimconv_jax.models.resnet import ResNetConfig


def draw_scales(
    key: jax.Array,
    num_images: int,
    config: ResNetConfig,
    *,
    drop_path_rate: float = 0.0,
    dropout_rate: float = 0.0,
) -> dict[str, jax.Array]:
    """Draws the keyword arguments of a ResNet for a batch; the options are keys of `config.step`.

    What is left out has the scale 0, the rest 1 / (1 - rate).

    Args:
      key: source of all randomness.
      num_images: in the batch.
      config: the architecture.
      drop_path_rate: with which an image's last residual branch is left out, from 0 in the first
        block on linearly (stochastic depth, Huang et al., ECCV 2016).
      dropout_rate: with which each of an image's pooled features is left out.

    Returns:
      `branch_scales` (N, blocks) and `feature_scales` (N, C), those of a rate above 0.

    Raises:
      ValueError: if a rate is out of range.
    """
    require_number("step: drop_path_rate", drop_path_rate, least=0, below=1)
    require_number("step: dropout_rate", dropout_rate, least=0, below=1)
    branch_key, feature_key = jax.random.split(key)
    scales = {}
    if drop_path_rate:
        rates = jnp.linspace(0, drop_path_rate, sum(config.blocks))
        scales["branch_scales"] = _dropped(branch_key, rates, (num_images, len(rates)))
    if dropout_rate:
        _, _, features = config.block_channels(3, config.blocks[3] - 1)
        scales["feature_scales"] = _dropped(feature_key, dropout_rate, (num_images, features))
    return scales


def _dropped(key: jax.Array, rate: jax.Array | float, shape: tuple[int, int]) -> jax.Array:
    return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)
