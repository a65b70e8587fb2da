import numpy as np
import pytest
from flax import nnx

from slimconv_jax import create_model, list_models
from slimconv_jax.models.zoo import ARCHITECTURES, abstract_model


def test_list_models():
    assert len(list_models()) == len(set(list_models())) == len(ARCHITECTURES)
    assert abstract_model("resnet14", num_classes=np.int64(7)).config.num_classes == 7
    assert set(list_models("sc_resnet*")) >= {"sc_resnet14", "sc_resnet50", "sc_resnet152"}
    assert list_models("vgg*") == []


def test_every_sc_model_but_one_has_its_plain_twin():
    for name in list_models("sc_*"):
        if name != "sc_resnext101_32x3d":
            assert name.removeprefix("sc_") in ARCHITECTURES


def test_overrides_reach_the_model():
    model = abstract_model(
        "sc_resnet26", k="8/3", num_classes=5, stem="cifar", width=16, dilation=[False, True, True]
    )
    assert model.config.reduction == 4
    assert model.classifier.kernel.shape == (512, 5)
    assert model.stem.conv.kernel.shape == (3, 3, 3, 16)
    assert model.stages[3][1].conv2.upper.conv.kernel_dilation == (4, 4)


def test_abstract_model_has_the_shapes_that_create_model_gives():
    settings = {"width": 8, "num_classes": 3, "k": 2}
    real = nnx.eval_shape(lambda: create_model("sc_resnet14", rngs=nnx.Rngs(0), **settings))
    abstract = abstract_model("sc_resnet14", **settings)
    assert nnx.graphdef(real) == nnx.graphdef(abstract)
    real, abstract = (nnx.to_flat_state(nnx.state(model)) for model in (real, abstract))
    assert [(path, v.shape, v.dtype) for path, v in real] == [
        (path, v.shape, v.dtype) for path, v in abstract
    ]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("sc_resnet5", {}, "unknown model 'sc_resnet5'; did you mean sc_resnet50"),
        ("vgg", {}, r"unknown model 'vgg'; list_models\(\) names them all"),
        ("resnet50", {"k": "4/3"}, "resnet50 has no SlimConv"),
        ("sc_resnet50", {"k": "5/3"}, "must be 2r/3"),
        (
            "sc_resnext50_32x4d",
            {"k": "8/3"},
            r"^sc_resnext50_32x4d at k=8/3: .*16 channels in its lower path, not divisible by 32 "
            "groups; k possible.*: 4/3",
        ),
        ("sc_resnet14", {"width": 3}, "sc_resnet14 at k=4/3: .* at least 4 input channels"),
        ("sc_resnet14", {"width": 0}, "width=0 must be an integer >= 1"),
        ("resnet14", {"num_classes": 2.0}, "num_classes=2.0"),
        ("resnet14", {"stem": "big"}, "stem='big' must be one of 'imagenet', 'cifar'"),
        ("resnet14", {"dilation": (True, True)}, "must be 3 booleans"),
        ("sc_resnet14", {"sc_stages": (True, True)}, "must be 4 booleans"),
        ("sc_resnet14", {"sc_stages": [False] * 4}, "leaves no stage with SlimConv"),
        ("sc_resnet14", {"gating": "reversed"}, "gating='reversed' must be one of 'flipped', 'pl"),
        ("sc_resnet14", {"min_squeezed": 0}, "min_squeezed=0 must be an integer >= 1"),
        (
            "sc_resnet14",
            {"gating": None, "min_squeezed": 2},
            "min_squeezed=2, gating=None: without a gate there is nothing to squeeze",
        ),
        ("resnet14", {"sc_stages": (False,) * 4}, r"sc_stages=\(False, .*\) is for SlimConv"),
        ("resnet14", {"gating": None}, "gating=None is for SlimConv, and this architecture"),
    ],
)
def test_bad_input(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        abstract_model(name, **overrides)
