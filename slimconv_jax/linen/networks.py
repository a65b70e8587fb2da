"""The ResNets for Linen."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.typing import Dtype

from slimconv_jax.linen.bridge import run_module
from slimconv_jax.models import resnet
from slimconv_jax.models.slimconv import CompressionRatio
from slimconv_jax.models.zoo import abstract_resnet, resnet_config


class ResNet(nn.Module):
    """`slimconv_jax`'s ResNet for Linen; `create_model` builds the named ones.

    Attributes:
      config: the architecture.
      zero_init_residual: whether the last batch norm of each residual branch starts at scale 0.
      remat: whether training recomputes the inside of the blocks to save memory.
      dtype: dtype of the computation; parameters, batch statistics and logits are float32.
    """

    config: resnet.ResNetConfig
    zero_init_residual: bool = False
    remat: bool = False
    dtype: Dtype | None = None

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (N, H, W, 3), float and normalised, to logits (N, num_classes).

        Without classes, to pooled features (N, C).

        Args:
          x: the images.
          train: whether batch norm uses and records the statistics of this batch, for which
            "batch_stats" must be mutable.

        Raises:
          ValueError: if the variables are not those of the architecture.
        """
        return self._run(lambda model: model(x), train)

    def features(self, x: jax.Array, train: bool = False) -> list[jax.Array]:
        """Returns the four feature maps of images.

            model.apply(variables, x, method="features")

        Arguments and errors are those of a call.
        """
        return self._run(lambda model: model.features(x), train)

    def _run(self, forward: Callable[[resnet.ResNet], Any], train: bool) -> Any:
        options = {"remat": self.remat, "dtype": self.dtype}
        build = functools.partial(
            resnet.ResNet, self.config, zero_init_residual=self.zero_init_residual, **options
        )
        return run_module(self, build, abstract_resnet(self.config, **options), forward, train)


def create_model(
    name: str,
    *,
    k: CompressionRatio | None = None,
    squeeze_ratio: int = 32,
    min_squeezed: int = 1,
    gating: str | None = "flipped",
    sc_stages: Sequence[bool] = (True, True, True, True),
    num_classes: int = 1000,
    stem: str = "imagenet",
    width: int = 64,
    dilation: Sequence[bool] = (False, False, False),
    zero_init_residual: bool = False,
    remat: bool = False,
    dtype: Dtype | None = None,
) -> ResNet:
    """Builds a Linen module of a named architecture.

    Arguments and errors are those of `slimconv_jax.create_model`, except `rngs`: `init` takes the
    key. It is also `init` that raises if a SlimConv of the architecture cannot exist.
    """
    config = resnet_config(
        name,
        k=k,
        squeeze_ratio=squeeze_ratio,
        min_squeezed=min_squeezed,
        gating=gating,
        sc_stages=sc_stages,
        num_classes=num_classes,
        stem=stem,
        width=width,
        dilation=dilation,
    )
    return ResNet(config, zero_init_residual=zero_init_residual, remat=remat, dtype=dtype)
