import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from randomize import randomized

from slimconv_jax import count_macs, count_params
from slimconv_jax.models.complexity import layers
from slimconv_jax.models.zoo import abstract_model

IMAGENET = [  # 1000 classes, 224x224: parameters, multiply-adds
    ("resnet50", None, 25_557_032, 4_089_184_256),
    ("resnet101", None, 44_549_160, 7_801_405_440),
    ("resnet152", None, 60_192_808, 11_513_626_624),
    ("resnext50_32x4d", None, 25_028_904, 4_230_479_872),
    ("resnext101_32x8d", None, 88_791_336, 16_414_015_488),
    ("wide_resnet50_2", None, 68_883_240, 11_398_021_120),
    ("wide_resnet101_2", None, 126_886_696, 22_753_050_624),
    ("sc_resnet50", "4/3", 16_758_740, 2_652_222_208),
    ("sc_resnet50", "8/3", 12_098_388, 1_880_314_624),
    ("sc_resnet101", "4/3", 27_956_708, 4_822_303_488),
    ("sc_resnet152", "4/3", 37_181_908, 6_992_372_480),
    ("sc_resnext50_32x4d", "4/3", 22_492_512, 3_821_358_080),
    ("sc_resnext101_32x8d", "4/3", 79_117_208, 14_488_424_448),
    ("sc_resnext101_32x3d", "2", 23_698_976, 4_580_553_984),
    ("sc_wide_resnet50_2", "4/3", 36_196_992, 6_061_214_720),
    ("sc_wide_resnet101_2", "4/3", 65_242_784, 11_684_416_512),
]

CIFAR100 = [  # 100 classes, 32x32, small-image stem
    ("resnet50", None, 23_705_252, 1_298_014_208),
    ("sc_resnet50", "4/3", 14_906_960, 828_855_040),
    ("sc_resnet50", "2", 11_561_690, 645_713_072),
    ("sc_resnet50", "8/3", 10_246_608, 576_803_584),
    ("sc_resnet50", "10/3", 9_515_271, 534_980_464),
    ("sc_resnet50", "4", 9_079_622, 512_310_448),
    ("sc_resnet50", "14/3", 8_798_126, 497_907_248),
    ("sc_resnet50", "16/3", 8_609_024, 488_624_896),
]


@pytest.mark.parametrize(("name", "k", "params", "macs"), IMAGENET)
def test_imagenet_counts(name, k, params, macs):
    model = abstract_model(name, k=k)
    assert (count_params(model), count_macs(model)) == (params, macs)
    # What the row gives as k is also the architecture's own, but for the one at 8/3.
    assert k == "8/3" or model.config == abstract_model(name).config


@pytest.mark.parametrize(("name", "params"), [("resnet18", 11_689_512), ("resnet34", 21_797_672)])
def test_basic_block_counts(name, params):
    assert count_params(abstract_model(name)) == params


@pytest.mark.parametrize(("name", "k", "params", "macs"), CIFAR100)
def test_cifar100_counts(name, k, params, macs):
    model = abstract_model(name, k=k, num_classes=100, stem="cifar")
    assert (count_params(model), count_macs(model, image_size=32)) == (params, macs)


class Counted(nnx.Module):
    """Products inside jit, scan, vmap and remat, 12 multiply-adds in each of 5 places."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 4)))

    def __call__(self, x):
        row = x[0, 0]  # (W, 3)
        kernel = self.kernel[...]
        y = jax.jit(jnp.dot)(row[0], kernel)
        y += jax.checkpoint(jnp.dot)(row[0], kernel)
        carry, _ = jax.lax.scan(lambda c, r: (c + r @ kernel, None), y, row[:3])
        return carry


def test_macs_are_counted_wherever_the_program_has_them():
    assert count_macs(Counted(), image_size=4) == 5 * 12


def test_counting_leaves_the_model_as_it_is():
    model = randomized(lambda: abstract_model("sc_resnet14", width=8, stem="cifar"))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    count_macs(model, 8)
    layers(model, 8)
    assert model.stem.bn.use_running_average is False
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))


def test_layers_are_in_order_and_add_up():
    model = abstract_model("sc_resnet26", k="8/3")
    rows = layers(model, 64)
    assert rows[0].path == () and rows[0].shape == (1, 1000)
    assert rows[0].params == count_params(model)
    assert rows[0].macs == count_macs(model, 64)
    paths = [row.path for row in rows]
    assert len(set(paths)) == len(paths)
    assert paths.index(("stages", 1, 0, "conv2")) < paths.index(("stages", 1, 0, "conv3"))
    leaves = [row for row in rows if row.type in ("Conv", "Linear", "BatchNorm")]
    assert sum(row.params for row in leaves) == rows[0].params
    assert sum(row.macs for row in leaves) == rows[0].macs
    by_path = {row.path: row for row in rows}
    unit = by_path["stages", 1, 0, "conv2"]
    assert (unit.type, unit.shape) == ("SlimConv", (1, 8, 8, 48))
    parts = [row for row in rows if row.path[:-1] == unit.path]
    assert [row.path[-1] for row in parts] == ["gate", "upper", "lower_reduce", "lower"]
    assert sum(row.macs for row in parts) == unit.macs


@pytest.mark.parametrize("image_size", [0, -1, 2.5, True])
def test_bad_image_size(image_size):
    with pytest.raises(ValueError, match=r"image_size=.* must be an integer >= 1"):
        count_macs(abstract_model("resnet14"), image_size)
