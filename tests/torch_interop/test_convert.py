import dataclasses
import re
import warnings
from collections import OrderedDict

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from randomize import randomized
from torch_state_dict import as_tensors, random_state_dict

from slimconv_jax import count_params, from_torch, to_torch
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.torch_interop import names
from slimconv_jax.torch_interop.convert import clean_state_dict, rename

SMALL = ResNetConfig((1, 1, 2, 1), reduction=2, width=8, num_classes=3, stem="cifar")
KINDS = {
    "sc": SMALL,
    "sc k=8/3": ResNetConfig((1, 1, 1, 1), reduction=4, width=16, num_classes=3),
    "groups": ResNetConfig((1, 1, 1, 1), groups=4, base_width=24, reduction=3, lower_groups=2),
    "bottleneck": ResNetConfig((1, 2, 1, 1), groups=2, base_width=32, width=8),
    "basic": ResNetConfig((1, 1, 1, 2), block="basic", width=8, num_classes=1),
    "ghost": ResNetConfig((1, 2, 1, 1), block="ghost", width=8, num_classes=3),
    "se": ResNetConfig((1, 2, 1, 1), block="se", width=8, num_classes=3),
    "narrow gates": dataclasses.replace(SMALL, squeeze_ratio=5, min_squeezed=3),
    "two stages": dataclasses.replace(SMALL, sc_stages=(False, True, False, True)),
    "plain gates": dataclasses.replace(SMALL, gating="plain"),
    "no lower gates": dataclasses.replace(SMALL, gating="upper"),
    "no gates": dataclasses.replace(SMALL, gating=None),
    "gates as wide as": dataclasses.replace(SMALL, width=16, squeeze_ratio=16),
    "se and sc": dataclasses.replace(SMALL, block="se", sc_stages=(True, True, False, True)),
}


@pytest.fixture(scope="module")
def state_dict():
    return random_state_dict(SMALL)


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_there_and_back_is_exact(config):
    start = random_state_dict(config)
    # What gates do is the only setting that shapes do not show.
    gating = config.gating if config.gating in ("plain", "upper") else None
    model = from_torch(start, gating=gating)
    assert model.config == config
    back = to_torch(model)
    same(back, start)
    assert sum(a.size for n, a in back.items() if "running" not in n) == count_params(model)
    assert all(array.flags.c_contiguous and array.flags.writeable for array in back.values())
    back["fc.bias"][:] += 1  # no part of the model
    same(to_torch(model), start)
    back = to_torch(model)
    again = from_torch(back, gating=gating)
    for one, other in zip(*map(nnx.to_flat_state, map(nnx.state, (model, again))), strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1][...], other[1][...])


def test_the_model_is_in_evaluation_mode(state_dict):
    model = from_torch(state_dict)
    assert model.stem.bn.use_running_average
    assert model.stages[0][0].conv2.gate.bn.use_running_average
    assert from_torch(state_dict, dtype="bfloat16").stem.conv.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="dtype='floaty' is not a dtype"):
        from_torch(state_dict, dtype="floaty")


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.backbone.", "_orig_mod."])
def test_prefixes_counters_and_other_things_beside(state_dict, prefix):
    tensors = as_tensors(state_dict, prefix)
    tensors[prefix + "bn1.num_batches_tracked"] = torch.tensor(5)
    tensors |= {"epoch": 3, 7: "seven", "best_prec1": torch.tensor(77.2)}
    same(to_torch(from_torch(OrderedDict(tensors))), state_dict)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_other_precision_become_float32(state_dict, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in as_tensors(state_dict).items()}
    expected = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    same(to_torch(from_torch(tensors)), expected)


def test_arrays_of_half_precision_and_parameters_that_want_gradients(state_dict):
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in state_dict.items()}
    same(to_torch(from_torch(half)), {n: a.astype(np.float32) for n, a in half.items()})
    parameters = {n: torch.nn.Parameter(t) for n, t in as_tensors(state_dict).items()}
    same(to_torch(from_torch(parameters)), state_dict)


def test_arch_and_k_are_asserted():
    state_dict = random_state_dict(KINDS["sc k=8/3"])
    assert from_torch(state_dict, arch="sc_resnet14", k="8/3").config == KINDS["sc k=8/3"]
    with pytest.raises(ValueError, match=r"resnet14 was asked for, and .* of sc_resnet14, k=8/3"):
        from_torch(state_dict, arch="resnet14")
    with pytest.raises(ValueError, match="k=2 was asked for, and the entries have k=8/3"):
        from_torch(state_dict, k=2)
    with pytest.raises(ValueError, match="unknown model 'sc_resnet41'; did you mean sc_resnet14"):
        from_torch(state_dict, arch="sc_resnet41")


def test_with_arch_the_report_has_missing_blocks(state_dict):
    with pytest.raises(ValueError, match="resnet14 was asked for, and the entries are those of"):
        from_torch(state_dict, arch="resnet14")
    with pytest.raises(ValueError) as caught:
        from_torch(state_dict, arch="sc_resnet26")  # it has blocks (1, 1, 2, 1), of no name
    message = str(caught.value)
    assert "not those of sc_resnet26, k=4/3, 3 classes, cifar stem, width 8" in message
    assert "  missing     layer4.1.conv2.fc.0.weight (2, 64, 1, 1)" in message
    assert "layer3.1" not in message


def test_every_difference_is_in_the_report(state_dict):
    bad = dict(state_dict)
    del bad["layer2.0.bn3.bias"]
    bad["layer1.0.conv1.weigth"] = bad.pop("layer1.0.conv1.weight")
    bad["aux.weight"] = np.zeros((2, 3), np.float32)
    bad["layer3.1.conv3.weight"] = bad["layer3.1.conv3.weight"].transpose(1, 0, 2, 3)
    with pytest.raises(ValueError) as caught:
        from_torch(bad)
    lines = str(caught.value).splitlines()
    assert (
        "blocks (1, 1, 2, 1), of no known name, k=4/3, 3 classes, cifar stem, width 8" in lines[0]
    )
    assert lines[1:] == [
        "  missing     layer1.0.conv1.weight (8, 8, 1, 1); is it layer1.0.conv1.weigth?",
        "  missing     layer2.0.bn3.bias (64,)",
        "  unexpected  layer1.0.conv1.weigth (8, 8, 1, 1)",
        "  unexpected  aux.weight (2, 3)",
        "  shape       layer3.1.conv3.weight is (24, 128, 1, 1), must be (128, 24, 1, 1)",
    ]


def test_no_entry_can_be_missing_or_of_another_shape(state_dict):
    for index, name in enumerate([*state_dict][::6]):
        bad = dict(state_dict)
        array = bad.pop(name)
        if index % 2:
            bad[name] = np.concatenate([array, array])
        with pytest.raises(ValueError, match=f"  (missing|shape  )     {re.escape(name)} "):
            from_torch(bad)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.zeros(3, dtype=torch.int32), "a tensor of type torch.int32"),
        (torch.zeros(3, dtype=torch.complex64), "a tensor of type torch.complex64"),
        (torch.zeros(3).to_sparse(), "a tensor that is sparse"),
        (torch.empty(3, device="meta"), "a tensor without values, on the meta device"),
        (torch.nn.UninitializedParameter(), "a tensor without values yet, of a lazy module"),
        (np.zeros(3, bool), "an array of type bool"),
        ([0.0, 0.0, 0.0], "a list"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_floating_point_tensor_is_refused(state_dict, value, what):
    message = f"fc.bias is {what}; a dense floating-point tensor is needed"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_torch(state_dict | {"fc.bias": value})


def test_a_tensor_that_no_network_has_is_unexpected(state_dict):
    with pytest.raises(ValueError, match=r"layer1.0.conv1.weight_mask is an array of type bool"):
        from_torch(state_dict | {"layer1.0.conv1.weight_mask": np.ones((2, 3), bool)})
    with pytest.raises(ValueError, match=r"from_torch takes a state dict, .* not a Linear"):
        from_torch(torch.nn.Linear(1, 1))
    with pytest.raises(
        ValueError,
        match=r"a state dict has tensors by name, and this has 'epoch', 'state_dict'; from a wh",
    ):
        from_torch({"epoch": 1, "state_dict": state_dict})


def test_several_networks_are_refused(state_dict):
    two = as_tensors(state_dict, "student.") | as_tensors(state_dict, "teacher.")
    with pytest.raises(ValueError, match=r"several networks, under .* 'student.' and 'teacher.'"):
        from_torch(two)
    same(to_torch(from_torch(rename(two, [(r"teacher\..*", "")]))), state_dict)
    with pytest.raises(ValueError, match=r"fc.bias appears twice, with and without the name of"):
        from_torch(as_tensors(state_dict, "module.") | {"fc.bias": state_dict["fc.bias"]})


def test_damaged_weights_are_a_warning_with_their_names(state_dict):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_torch(state_dict)
    bad = {name: array.copy() for name, array in state_dict.items()}
    bad["layer1.0.conv1.weight"][0, 1] = np.nan
    bad["fc.bias"][2] = np.inf
    bad["bn1.running_var"][0] = -1
    with pytest.warns(UserWarning) as caught:
        model = from_torch(bad)
    assert str(caught[0].message) == (
        "these entries look damaged: bn1.running_var (negative), "
        "layer1.0.conv1.weight (infinite or NaN), fc.bias (infinite or NaN)"
    )
    same(to_torch(model), bad)
    large = state_dict | {"fc.bias": np.full(3, 1e300)}
    with pytest.warns(UserWarning, match=r"look damaged: fc.bias \(infinite or NaN\)"):
        from_torch(large)


def test_rename(state_dict):
    foreign = {f"net/{name.replace('layer', 'stage')}": a for name, a in state_dict.items()}
    substitutions = [("^net/", ""), (r"^stage(\d)", r"layer\1")]
    same(clean_state_dict(rename(foreign, substitutions)), state_dict)
    with pytest.raises(ValueError, match=r"rename '\(' to ''"):
        rename(state_dict, [("(", "")])
    with pytest.raises(ValueError, match=r"rename 'fc' to .*: invalid group reference 9"):
        rename(state_dict, [("fc", r"\9")])
    assert rename({7: 1, "a": 2, "b": 3}, [("a", "c"), ("b", "")]) == {7: 1, "c": 2}
    with pytest.raises(ValueError, match="rename 'head': this matches no name"):
        rename(state_dict, [("head", "fc")])
    with pytest.raises(ValueError, match=r"two entries are named 'fc.x' after renaming"):
        rename(state_dict, [("^fc.*", "fc.x")])


def test_another_convention_is_one_more_row(state_dict, monkeypatch):
    stem = {"conv1.weight": "stem.conv.weight"}
    foreign = {f"module.{stem.get(name, name)}": array for name, array in state_dict.items()}
    with pytest.raises(ValueError, match=r"unexpected  stem\.conv\.weight"):
        from_torch(foreign)
    monkeypatch.setattr(names, "CONVENTIONS", (*names.CONVENTIONS, ("stem.conv", "stem.conv")))
    same(to_torch(from_torch(foreign)), state_dict)


def test_to_torch_takes_our_resnets_only():
    with pytest.raises(ValueError, match="takes a slimconv_jax ResNet, not a dict"):
        to_torch({})


def test_a_network_without_classifier_comes_back():
    model = randomized(lambda: abstract_model("sc_resnet14", width=16, num_classes=3))
    headless = {name: v for name, v in to_torch(model).items() if not name.startswith("fc.")}
    for prefix in ("", "backbone.", "module.encoder_q."):
        back = from_torch(as_tensors(headless, prefix))
        assert back.config.num_classes == 0
        same(to_torch(back), headless)
    of_no_classes = {"fc.weight": torch.zeros(0, 256), "fc.bias": torch.zeros(0)}
    same(to_torch(from_torch(as_tensors(headless) | of_no_classes)), headless)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("layer1.0.", "layer1.0._checkpoint_wrapped_module."),
        lambda name: (
            f"_fsdp_wrapped_module.{name.replace('layer2.', 'layer2._fsdp_wrapped_module.')}"
        ),
        lambda name: name.replace("layer2.0.", "layer2.0._fpw_module._wrapped_module."),
        lambda name: name.replace("bn1.", "bn1.module.") if name.startswith("layer3") else name,
    ],
)
def test_wrappers_are_taken_off_names(state_dict, wrap):
    same(to_torch(from_torch({wrap(name): v for name, v in state_dict.items()})), state_dict)


def test_an_entry_in_and_out_of_a_wrapper_is_there_twice(state_dict):
    twice = state_dict | {"_orig_mod.fc.bias": state_dict["fc.bias"]}
    with pytest.raises(ValueError, match=r"^fc.bias appears twice, with and without the name of a"):
        from_torch(twice)


class Subclass(torch.Tensor):
    """A kind of tensor of someone else's."""


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.as_subclass(Subclass),
        torch.nn.Parameter,
        lambda t: t.to(torch.bfloat16),
        lambda t: t.to(torch.float8_e5m2),
        lambda t: t.numpy().astype(jnp.bfloat16),
    ],
)
def test_tensors_of_all_kinds_are_read(state_dict, change):
    exact = {name: np.sign(array) for name, array in state_dict.items()}
    model = from_torch({name: change(torch.from_numpy(v)) for name, v in exact.items()})
    same(to_torch(model), exact)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["conv1.0.weight", "layer1.0.conv1.weight"], "a ResNet with a deep stem (ResNet-C or -D)"),
        (
            ["layer1.0.se_module.fc1.weight"],
            "a ResNet with squeeze-and-excitation of another kind than timm's seresnet",
        ),
        (["layer1.0.convs.0.weight"], "a Res2Net"),
        (["blocks.0.attn.qkv.weight"], "a vision transformer"),
        (["features.0.weight"], "a VGG, AlexNet or MobileNet"),
        (["features.denseblock1.denselayer1.conv1.weight"], "a DenseNet"),
    ],
)
def test_other_networks_are_named(state_dict, names, what):
    array = np.ones((2, 3, 1, 1), np.float32)
    for given in (dict.fromkeys(names, array), state_dict | dict.fromkeys(names, array)):
        with pytest.raises(ValueError, match=f"^this looks like {re.escape(what)}: "):
            from_torch(given)
