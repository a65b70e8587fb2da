"""Recognises networks that people mistake for torchvision's ResNets, by the names in them."""

import re
from collections.abc import Iterable

_SIGNS = (
    (r"(patch_embed|cls_token|blocks\.\d+\.attn|encoder_layer)", "a vision transformer"),
    (r"stages?\.\d+\.blocks\.\d+\.(dwconv|conv_dw)", "a ConvNeXt"),
    (r"denseblock\d+", "a DenseNet"),
    (r"(_blocks\.\d+\._|conv_pwl|inverted|_expand_conv)", "an EfficientNet or MobileNet"),
    (r"features\.\d+\.\d+\.block\.", "an EfficientNet or ConvNeXt of torchvision"),
    (r"features\.\d+\.(weight|conv)", "a VGG, AlexNet or MobileNet"),
    (r"Mixed_\d", "an Inception network"),
    (r"(^|\.)(backbone\.bottom_up\.)?res[2-5]\.\d+\.conv", "a ResNet of Detectron2"),
    (r"resnet\.embedder|encoder\.stages\.\d+\.layers", "a ResNet of Hugging Face's Transformers"),
    (r"block\d+/unit_\d+|block\d+\.unit\d+", "a Big Transfer ResNet (BiT)"),
    (r"trunk_output|s[1-4]\.b\d+\.", "a RegNet"),
    (r"layer\d\.\d+\.(convs|bns)\.\d", "a Res2Net"),
    (r"layer\d\.\d+\.conv2\.(fc1|rsoftmax|bn0)", "a ResNeSt"),
    (r"layer\d\.\d+\.conv2\.(paths|attn|conv_kernel)", "a selective-kernel ResNet (SKNet)"),
    (
        r"layer\d\.\d+\.(se_module\.|se\.(conv|fc\.\d))",
        "a ResNet with squeeze-and-excitation of another kind than timm's seresnet",
    ),
    (r"layer\d\.\d+\.(ca|sa|cbam)\.", "a ResNet with attention of its own (CBAM)"),
    (r"(^|\.)conv1\.\d\.weight|(^|\.)stem\.\d", "a ResNet with a deep stem (ResNet-C or -D)"),
    (r"layer\d\.\d+\.(gn|norm)\d", "a ResNet with norms of another kind or name"),
    (
        r"parametrizations|weight_orig|weight_mask|weight_g$|weight_v$",
        "a pruned or reparametrised network, to be made plain in PyTorch first",
    ),
    (r"attnpool\.", "a ResNet of CLIP"),
    (r"(_packed_params|zero_point|activation_post_process)", "a quantised network"),
    (r"(^|\.)(lora_|adapter)", "a network with an adapter (LoRA), to be merged first"),
)
"""Patterns of names, and what has such names; the first that fits is reported."""


def looks_like(names: Iterable[str]) -> str:
    """Returns the beginning of a sentence: which other network has such names; "" if none."""
    names = list(names)
    found = (what for sign, what in _SIGNS if any(re.search(sign, name) for name in names))
    return next((f"this looks like {what}: " for what in found), "")
