from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from flax import nnx
from randomize import apply, randomized

from slimconv_jax import SlimConv
from slimconv_jax.models.slimconv import k_from_reduction, reduction_from_k

# Channels, r, and the settings of the unit. 50 channels are not divisible by 3 or 4.
CASES = [
    (32, 2, {}),
    (48, 2, {"strides": 2, "feature_group_count": 4}),
    (50, 3, {"strides": 2}),
    (50, 4, {"kernel_dilation": 2}),
    (48, 3, {"feature_group_count": 8, "lower_feature_group_count": 4}),
    (80, 5, {"feature_group_count": 2, "strides": 2, "kernel_dilation": 2, "squeeze_ratio": 16}),
    (20, 2, {"gating": "plain", "min_squeezed": 7}),
    (20, 2, {"gating": "upper"}),
    (20, 3, {"gating": None}),
]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("channels", "reduction", "settings"), CASES)
def test_output_equals_numpy(channels, reduction, settings, train):
    rng = np.random.default_rng(reduction)
    x = rng.normal(size=(4, 9, 10, channels))
    for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-12)):
        with jax.enable_x64(dtype == np.float64):  # the model is cast as well
            unit = randomized(
                lambda: SlimConv(channels, reduction=reduction, rngs=nnx.Rngs(0), **settings), dtype
            )
            unit.train() if train else unit.eval()
            groups = settings.get("feature_group_count", 1)
            expected = reference.slimconv(
                x,
                reference.parameters(unit),
                reduction,
                strides=settings.get("strides", 1),
                dilation=settings.get("kernel_dilation", 1),
                groups=groups,
                lower_groups=settings.get("lower_feature_group_count", groups),
                train=train,
                gating=unit.gating,
            )
            assert unit.gate is None or unit.gate.bn.num_features == max(
                channels // settings.get("squeeze_ratio", 32), settings.get("min_squeezed", 1)
            )
            y = np.asarray(apply(unit, jnp.asarray(x, dtype)))
        assert y.dtype == dtype
        assert y.shape == expected.shape == (*y.shape[:-1], unit.out_features)
        assert (
            y.shape[-1] == unit.out_features == channels // reduction + channels // (2 * reduction)
        )
        assert np.abs(y - expected).max() <= tolerance * np.abs(expected).max()


def test_k_and_reduction_are_two_names_of_one_setting():
    for r, k in enumerate(("4/3", "2", "8/3", "10/3", "4", "14/3", "16/3"), start=2):
        assert reduction_from_k(k) == r
        assert reduction_from_k(Fraction(k)) == r
        assert reduction_from_k(2 * r / 3) == r
        assert k_from_reduction(r) == Fraction(k)
    assert nnx.eval_shape(lambda: SlimConv(64, rngs=nnx.Rngs(0))).reduction == 2
    assert nnx.eval_shape(lambda: SlimConv(64, k=4, rngs=nnx.Rngs(0))).reduction == 6


@pytest.mark.parametrize(
    "k", ["5", 1, "2/3", 0, -2, "1/0", "x", "", None, True, [2], float("nan"), float("inf"), 2.67]
)
def test_impossible_k(k):
    with pytest.raises(ValueError, match=r"must be 2r/3 .* 4/3, 2, 8/3"):
        reduction_from_k(k)


@pytest.mark.parametrize(
    ("channels", "settings", "message"),
    [
        (7, {"k": "8/3"}, r"needs at least 8 input channels and got 7; k possible.*: 4/3, 2"),
        (3, {}, "k possible with these channels and groups: none"),
        (128, {"k": "8/3", "feature_group_count": 32}, "16 channels in its lower path.* 32 groups"),
        (64, {"feature_group_count": 5}, "32 channels in its upper path, not divisible by 5"),
        (64, {"k": 2, "reduction": 3}, "not both"),
        (64, {"reduction": 1}, "reduction=1 must be an integer >= 2"),
        (64, {"squeeze_ratio": 0}, "squeeze_ratio=0"),
        (
            64,
            {"gating": "none"},
            "SlimConv: gating='none' must be one of 'flipped', 'plain', 'up",
        ),
        (64.0, {}, "in_features=64.0"),
    ],
)
def test_impossible_units(channels, settings, message):
    with pytest.raises(ValueError, match=message):
        SlimConv(channels, rngs=nnx.Rngs(0), **settings)


def test_the_possible_k_that_an_error_names_are_possible():
    with pytest.raises(ValueError, match=r"possible with these channels and groups: 4/3, 8/3$"):
        SlimConv(64, k="16/3", feature_group_count=8, rngs=nnx.Rngs(0))
    for k in ("4/3", "8/3"):
        SlimConv(64, k=k, feature_group_count=8, rngs=nnx.Rngs(0))


def test_bfloat16_is_near_float32_and_leaves_parameters_alone():
    unit = randomized(lambda: SlimConv(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    full = randomized(lambda: SlimConv(64, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 64)).astype(np.float32)
    y, expected = apply(unit, x), apply(full, x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(unit))} == {jnp.dtype("float32")}
    assert jnp.abs(y - expected).max() < 0.05 * jnp.abs(expected).max()


@pytest.mark.parametrize("change", ["epsilon", "momentum", "flax", "group", "none"])
def test_paths_with_norms_of_their_own_are_computed_one_by_one(change):
    unit = randomized(lambda: SlimConv(16, rngs=nnx.Rngs(0)))
    if change == "flax":
        unit.upper.bn = nnx.BatchNorm(8, use_scale=False, rngs=nnx.Rngs(0))
    elif change == "group":
        unit.lower.bn = nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
    elif change == "none":
        unit.lower.bn = nnx.identity
    else:
        setattr(unit.lower.bn, change, 0.5)
    unit.train()
    apart = nnx.clone(unit)
    x = jax.random.normal(jax.random.key(0), (4, 5, 5, 16))
    upper, lower = apart.reconstruct(x)
    upper, lower = apart.upper(upper), apart.lower(nnx.relu(apart.lower_reduce(lower)))
    np.testing.assert_allclose(unit(x), jnp.concatenate([upper, lower], -1), rtol=1e-4, atol=1e-5)
    stats = [nnx.to_pure_dict(nnx.state(each, nnx.BatchStat)) for each in (unit, apart)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *stats)


def test_initial_values():
    unit = SlimConv(512, rngs=nnx.Rngs(0))
    fan_out = 9 * 256  # of the upper convolution
    assert np.std(unit.upper.conv.kernel[...]) == pytest.approx((2 / fan_out) ** 0.5, rel=0.01)
    assert np.std(unit.gate.squeeze.kernel[...]) == pytest.approx((2 / 16) ** 0.5, rel=0.05)
    bias = np.asarray(unit.gate.excite.bias[...])
    assert np.abs(bias).max() <= 16**-0.5
    assert np.std(bias) == pytest.approx(16**-0.5 / 3**0.5, rel=0.1)
    assert (unit.upper.bn.scale[...] == 1).all() and (unit.upper.bn.bias[...] == 0).all()
    assert unit.gate.squeeze.bias is None and unit.upper.conv.bias is None


@pytest.mark.parametrize("shape", [(1, 4, 4, 12), (1, 8), (8, 4, 4)])
def test_other_inputs_are_refused(shape):
    unit = nnx.eval_shape(lambda: SlimConv(8, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"SlimConv\(8\) takes \(..., H, W, 8\), not"):
        nnx.eval_shape(lambda unit: unit(jnp.zeros(shape)), unit)
