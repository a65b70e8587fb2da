"""The ghost module of the comparison system Ghost-ResNet-50 (Han et al., CVPR 2020)."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from slimconv_jax.errors import InputError
from slimconv_jax.models.layers import ConvBN


class GhostConvBN(nnx.Module):
    """A convolution and batch norm that compute half of the outputs from the other half.

    A primary convolution to half of the channels, then batch norm; a 3x3 depthwise convolution of
    that, then batch norm; the two concatenated (s=2, d=3 in the paper). It replaces `ConvBN`, and
    like it has no activation, not even between the two.

    Args:
      in_features: channels of the input.
      out_features: channels of the output, an even number.
      kernel_size: side of the primary kernel, odd.
      strides: stride of the primary convolution.
      scale_init: initialiser of the batch norms' scales.
      dtype: dtype of the computation; inferred from input and parameters if None.
      rngs: source of the initial parameters.

    Raises:
      ValueError: if the number of outputs is odd.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        strides: int = 1,
        scale_init: Initializer = jax.nn.initializers.ones,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        if out_features % 2:
            raise InputError(
                f"a ghost module computes half of its channels from the others, so their number "
                f"must be even, not {out_features}"
            )
        half = out_features // 2
        common = {"scale_init": scale_init, "dtype": dtype, "rngs": rngs}
        self.primary = ConvBN(in_features, half, kernel_size, strides=strides, **common)
        self.cheap = ConvBN(half, half, 3, feature_group_count=half, **common)
        self.out_features = out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, in_features) to (N, H', W', out_features)."""
        x = self.primary(x)
        return jnp.concatenate([x, self.cheap(x)], axis=-1)
