"""SlimConv and the ResNets for Flax Linen code.

    model = slimconv_jax.linen.create_model("sc_resnet50", num_classes=10)
    variables = model.init(key, images)  # "params" and "batch_stats"
    logits = model.apply(variables, images)
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])

The modules compute the same as those of NNX, with variables of the same names, so that they take
`variables(nnx_model)`. `SlimmedConv` replaces `nn.Conv`, and `slimify` puts SlimConv into a whole
network.
"""

from slimconv_jax.linen.bridge import variables
from slimconv_jax.linen.layers import SlimConv, SlimmedConv
from slimconv_jax.linen.networks import ResNet, create_model
from slimconv_jax.linen.slimified import Slimified, slimify

__all__ = [
    "ResNet",
    "SlimConv",
    "Slimified",
    "SlimmedConv",
    "create_model",
    "slimify",
    "variables",
]


def __dir__() -> list[str]:
    return __all__
