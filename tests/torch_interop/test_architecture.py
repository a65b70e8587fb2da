import dataclasses

import pytest

from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.models.zoo import ARCHITECTURES
from slimconv_jax.torch_interop.architecture import read_architecture


def shapes_of(config):
    # Of the PyTorch reference, which knows nothing of `read_architecture`.
    import torch

    from slimconv_jax.torch_interop.reference import ResNet

    with torch.device("meta"):
        state_dict = ResNet(config).state_dict()
    return {
        name: tuple(tensor.shape)
        for name, tensor in state_dict.items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_read_off_its_shapes(name):
    config = ARCHITECTURES[name]
    assert read_architecture(shapes_of(config)) == config
    other = dataclasses.replace(config, num_classes=7, stem="cifar")
    assert read_architecture(shapes_of(other)) == other


@pytest.mark.parametrize("reduction", range(2, 9))
@pytest.mark.parametrize("width", [32, 48, 64])
def test_k_and_width(reduction, width):
    config = dataclasses.replace(ARCHITECTURES["sc_resnet14"], reduction=reduction, width=width)
    assert read_architecture(shapes_of(config)) == config


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig((1, 2, 1, 3), groups=4, base_width=24, reduction=3, lower_groups=2),
        ResNetConfig((2, 1, 1, 1), groups=8, base_width=16, width=32),
        ResNetConfig((1, 1, 3, 1), block="basic", width=20),
    ],
)
def test_architectures_without_a_name(config):
    assert read_architecture(shapes_of(config)) == config


def test_a_network_too_narrow_for_its_k_to_show_needs_it():
    # The same channels in every stage: 2 + 1, 4 + 2, 8 + 4 and 16 + 8.
    config = dataclasses.replace(ARCHITECTURES["sc_resnet14"], reduction=31)
    with pytest.raises(ValueError, match="so narrow that k=62/3 and 64/3 fit its shapes; say"):
        read_architecture(shapes_of(config))
    assert read_architecture(shapes_of(config), k="62/3") == config
    with pytest.raises(ValueError, match="k=2 was asked for, and the entries have k=62/3 and 64"):
        read_architecture(shapes_of(config), k="2")


def test_numbers_of_blocks_that_make_no_sense_are_left_out():
    shapes = shapes_of(ARCHITECTURES["sc_resnet14"])
    stray = {f"layer3.999.{name}": (1,) for name in ("a.weight", "b.weight", "c.weight")}
    assert read_architecture(shapes | stray) == ARCHITECTURES["sc_resnet14"]


def test_one_bad_entry_does_not_change_the_architecture():
    config = ARCHITECTURES["sc_resnet50"]
    shapes = shapes_of(config)
    for name, shape in shapes.items():
        if name.startswith("layer") and len(shape) == 4:
            without = {other: s for other, s in shapes.items() if other != name}
            assert read_architecture(without) == config
            assert read_architecture(shapes | {name: shape[::-1]}) == config
            assert read_architecture(without | {name.replace("layer", "layer9"): shape}) == config


@pytest.mark.parametrize(
    ("change", "k", "message"),
    [
        (lambda shapes: {}, None, "not the entries of a ResNet .* the first names are none"),
        (
            lambda shapes: {"features.0.weight": (64, 3, 3, 3)},
            None,
            "not the entries of a ResNet .* 'features.0.weight'",
        ),
        (
            lambda shapes: {n: s for n, s in shapes.items() if not n.startswith("layer4")},
            None,
            "layer4.0.conv1.weight",
        ),
        (lambda shapes: shapes, "8/3", "k=8/3 was asked for, and the entries have k=4/3"),
        (lambda shapes: shapes, "5/7", "must be 2r/3"),
        (
            lambda shapes: shapes_of(ARCHITECTURES["resnet14"]),
            "8/3",
            "k=8/3 was asked for, and the entries have no SlimConv",
        ),
        (
            lambda shapes: shapes_of(ARCHITECTURES["resnet18"]),
            "8/3",
            "k=8/3 was asked for, and the entries have no SlimConv",
        ),
        (
            lambda shapes: {
                n: (s[0] + 1, *s[1:]) if "conv2_1.0" in n else s for n, s in shapes.items()
            },
            None,
            "fit no compression ratio",
        ),
        (
            lambda shapes: {n: () if "conv" in n else s for n, s in shapes.items()},
            None,
            "no block has a convolution conv3.weight",
        ),
        (
            lambda shapes: {n: s[:2] if "conv3" in n else s for n, s in shapes.items()},
            None,
            "no block has a convolution conv3.weight",
        ),
        (
            lambda shapes: {n.replace(".conv2.", ".convs.0."): s for n, s in shapes.items()},
            None,
            r"no block has a 3x3 convolution conv2.weight, nor conv2.conv2_1.0.weight",
        ),
    ],
)
def test_bad_shapes(change, k, message):
    with pytest.raises(ValueError, match=message):
        read_architecture(change(shapes_of(ARCHITECTURES["sc_resnet14"])), k=k)
