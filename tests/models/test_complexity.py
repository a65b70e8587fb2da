import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from randomize import randomized

from slimconv_jax import count_macs, count_params
from slimconv_jax.models.complexity import layers
from slimconv_jax.models.zoo import abstract_model

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


@pytest.mark.parametrize(("name", "k", "params", "macs"), CIFAR100)
def test_cifar100_counts(name, k, params, macs):
    model = abstract_model(name, k=k, num_classes=100, stem="cifar")
    assert (count_params(model), count_macs(model, image_size=32)) == (params, macs)


def test_squeeze_and_excitation_has_the_count_of_timm():
    assert count_params(abstract_model("se_resnet50")) == 28_088_024


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
