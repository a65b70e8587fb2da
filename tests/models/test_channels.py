import json
from pathlib import Path

import numpy as np
import pytest
from randomize import apply, randomized
from torch_state_dict import random_state_dict

from slimconv_jax import (
    count_macs,
    count_params,
    create_model,
    from_torch,
    save_model,
    slimify,
    to_torch,
)
from slimconv_jax.models.channels import read_channels
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.models.zoo import (
    abstract,
    abstract_model,
    describe,
    name_of,
    normalize_model,
    parse_model,
)
from slimconv_jax.storage.model_directory import load_model

SMALL = {
    "stem": 24,
    "stages": [
        [[16, 20, 40], [12, 8, 40]],
        [[30, 24, 72]],
        [[40, 44, 120], [20, 36, 120]],
        [[64, 48, 200]],
    ],
}


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "channels.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_the_channels_of_resnet50_give_resnet50(written):
    stages = [[[n, n, 4 * n]] * count for n, count in ((64, 3), (128, 4), (256, 6), (512, 3))]
    path = written({"stem": 64, "stages": stages})
    for settings in ({}, {"width": 16, "num_classes": 10, "stem": "cifar"}):
        model, regular = abstract_model(path, **settings), abstract_model("resnet50", **settings)
        assert count_params(model) == count_params(regular)
        assert count_macs(model, 64) == count_macs(regular, 64)


def test_every_convolution_has_its_channels(written):
    model = abstract_model(Path(written(SMALL)), num_classes=5)
    assert model.stem.conv.kernel.shape == (7, 7, 3, 24)
    block = model.stages[2][1]
    kernels = [c.conv.kernel.shape for c in (block.conv1, block.conv2, block.conv3)]
    assert kernels == [(1, 1, 120, 20), (3, 3, 20, 36), (1, 1, 36, 120)]
    assert block.shortcut is None
    assert model.stages[3][0].shortcut.conv.kernel.shape == (1, 1, 120, 200)
    assert model.classifier.kernel.shape == (200, 5)
    assert name_of(model.config) is None
    assert describe(model.config).startswith("bottleneck blocks (2, 1, 2, 1), of irregular widths")


def test_it_is_saved_loaded_and_equal_to_pytorch(written, tmp_path):
    import torch

    from slimconv_jax.torch_interop.reference import ResNet

    path = written(SMALL)
    config = abstract_model(path, num_classes=5, stem="cifar").config
    state_dict = random_state_dict(config)
    model = from_torch(state_dict, arch=path)
    assert model.config == config
    for name, array in to_torch(model).items():
        np.testing.assert_array_equal(array, state_dict[name])
    save_model(model, tmp_path / "saved")
    model = load_model(tmp_path / "saved")
    assert model.config == config
    reference = ResNet(config).eval()
    reference.load_state_dict({n: torch.from_numpy(a) for n, a in state_dict.items()}, strict=False)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = reference(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(apply(model, images), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.long
def test_slimify_leaves_the_architecture_irregular(written):
    path = written(SMALL)

    def build(rngs):
        slim, report = slimify(create_model(path, rngs=rngs), k="4/3", image_size=32, rngs=rngs)
        assert len(report.replaced) == 6 and not report.left
        return slim

    slim = abstract(build)
    assert count_params(slim) < count_params(abstract_model(path))
    with pytest.raises(ValueError, match="this one was changed"):
        to_torch(slim)


def test_models_of_before_there_were_channels_are_loaded(tmp_path):
    model = randomized(lambda: abstract_model("resnet14", width=8, num_classes=3))
    save_model(model, tmp_path / "saved")
    description = json.loads((tmp_path / "saved/model.json").read_text())
    del description["architecture"]["channels"]
    (tmp_path / "saved/model.json").write_text(json.dumps(description))
    assert load_model(tmp_path / "saved").config == model.config


def test_without_the_file_the_error_asks_for_it(written):
    state_dict = random_state_dict(abstract_model(written(SMALL)).config)
    with pytest.raises(ValueError, match="if its widths are irregular, `arch` must be a JSON file"):
        from_torch(state_dict)


def test_a_file_is_a_model_of_the_command_lines():
    assert parse_model("sc_resnet50@8/3") == ("sc_resnet50", "8/3")
    assert parse_model("resnet50") == ("resnet50", None)
    assert parse_model("at@home/channels.json") == ("at@home/channels.json", None)
    assert normalize_model("sc_resnet50@2.0") == "sc_resnet50@2"
    assert normalize_model("sc_resnet50") == "sc_resnet50@4/3"
    assert normalize_model("ghost_resnet50") == "ghost_resnet50"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "its keys must be 'stem' and 'stages', not a list"),
        ({"stem": 8}, r"its keys must be 'stem' and 'stages', not \['stem'\]"),
        ({"stem": 8, "stages": [[[8, 8, 8]]] * 3}, "it must have four stages, not 3"),
        ({"stem": 0, "stages": [[[8, 8, 8]]] * 4}, "the stem's channels=0 must be an integer >= 1"),
        ({"stem": 8, "stages": [[[8, 8]]] * 4}, "stage 1 has channels .8, 8.; it must have three"),
        ({"stem": 8, "stages": [[[8, "8", 8]]] * 4}, "stage 1: a number of channels='8' must be"),
        ({"stem": 8, "stages": [[[8, 8, 8], [8, 8, 9]]] * 4}, "stage 1 must have the same last"),
        ({"stem": 8, "stages": [8] * 4}, "stages must be four lists of blocks"),
        ({"stem": 8, "stages": "abcd"}, "stages must be four lists of blocks"),
        ({"stem": 8, "stages": [[8]] * 4}, "four lists of blocks, each of three numbers"),
        ("[" * 100_000, "is not JSON"),
        ({"stem": 8, "stages": [[]] * 4}, "stage 1: the number of blocks=0"),
    ],
)
def test_bad_files(content, message, written):
    path = written(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_channels(path)
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 5}, "channels must be those of the stem and four lists of blocks"),
        ({"channels": (1, 2, 3)}, "channels must be those of the stem and four lists of blocks"),
        ({"channels": (8, ()), "blocks": (1, 1, 1, 1)}, r"must have blocks=\(1, 1, 1, 1\) rows"),
        ({"channels": (8, [[(8, 8, 8)]] * 4), "groups": 2}, "are for plain bottlenecks"),
        ({"channels": (8, [[(8, 8, 8)]] * 4), "block": "ghost"}, "are for plain bottlenecks"),
    ],
)
def test_bad_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**{"blocks": (1, 1, 1, 1)} | settings)


def test_other_bad_input(written, tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*none.json"):
        abstract_model(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="has no SlimConv, so it takes no k"):
        abstract_model(written(SMALL), k=2)
    state_dict = random_state_dict(abstract_model(written(SMALL)).config)
    with pytest.raises(ValueError, match="has no SlimConv, so it takes no k"):
        from_torch(state_dict, arch=written(SMALL), k=2)
    other = SMALL | {"stem": 32}
    with pytest.raises(ValueError, match=r"shape +conv1.weight is \(24, .* must be \(32, "):
        from_torch(state_dict, arch=written(other))


def test_a_byte_order_mark_is_no_part_of_the_text(written):
    expected = read_channels(written(json.dumps(SMALL)))
    assert read_channels(written("\ufeff" + json.dumps(SMALL))) == expected
