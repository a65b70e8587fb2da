import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from randomize import randomized

from slimconv_jax.models.layers import BatchNorm, ConvBN, normalize
from slimconv_jax.models.operations import conv_general_dilated, max_pool
from slimconv_jax.models.zoo import abstract_model


def test_batch_norm_keeps_nine_tenths_of_its_running_averages():
    norm = BatchNorm(3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(2, 3, (8, 5, 5, 3)).astype(np.float32)
    y = norm(jnp.asarray(x))
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-5)
    norm.eval()
    before = norm.mean[...]
    norm(jnp.asarray(x))
    np.testing.assert_array_equal(norm.mean[...], before)


@pytest.mark.parametrize("shape", [(4, 6, 6, 5), (144, 1, 1, 5), (144, 5)])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norm_equals_its_base_class(mode, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    ours = BatchNorm(5, rngs=nnx.Rngs(0))
    base = nnx.BatchNorm(5, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))
    for norm in (ours, base):
        norm.eval() if mode == "eval" else norm.train()
    np.testing.assert_allclose(ours(x), base(x), atol=1e-6)
    for mine, theirs in ((ours.mean, base.mean), (ours.var, base.var)):
        np.testing.assert_allclose(mine[...], theirs[...], atol=1e-7)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norms_side_by_side_are_each_itself(mode):
    norms = [randomized(lambda n=n: BatchNorm(n, rngs=nnx.Rngs(0))) for n in (3, 2)]
    apart = nnx.clone(norms)
    for norm in (*norms, *apart):
        norm.eval() if mode == "eval" else norm.train()
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 5))
    y = normalize(norms, [x[..., :3], x[..., 3:]])
    np.testing.assert_allclose(y[..., :3], apart[0](x[..., :3]), atol=1e-6)
    np.testing.assert_allclose(y[..., 3:], apart[1](x[..., 3:]), atol=1e-6)
    states = [nnx.to_pure_dict(nnx.state(each, nnx.BatchStat)) for each in (norms, apart)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *states)


def test_batch_norm_in_bfloat16_has_float32_statistics():
    norm = BatchNorm(2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    norm.mean.set_value(jnp.array([1.001, 100.1]))  # 1.001 and 100.1 are not bfloat16 numbers
    norm.eval()
    x = jnp.array([[1.0, 100.0]], jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), [[-0.001, -0.1]], rtol=0.01)


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("strides", [1, 2])
def test_padding_is_symmetric(side, strides):
    # With a kernel that picks its centre, output i is input i * strides; XLA's "SAME" would
    # give input i * strides + 1 at stride 2 and an even side.
    layer = ConvBN(1, 1, 3, strides=strides, rngs=nnx.Rngs(0))
    layer.conv.kernel.set_value(jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1))
    layer.eval()
    x = jnp.arange(side * side, dtype=jnp.float32).reshape(1, side, side, 1)
    np.testing.assert_allclose(layer(x), x[:, ::strides, ::strides], rtol=1e-5)


@pytest.mark.parametrize("in_one_pass", [False, True])
def test_batch_norm_does_not_cancel(in_one_pass):
    # Values that differ in the fifth digit, as global averages within a batch may. One pass needs
    # a running mean that is about right; two need none.
    shape = (16, 2, 2, 4) if in_one_pass else (64, 1, 1, 4)
    x = 100 + 1e-2 * np.random.default_rng(0).normal(size=shape).astype(np.float32)
    norm = BatchNorm(4, rngs=nnx.Rngs(0))
    if in_one_pass:
        norm.mean.set_value(jnp.full(4, 100.02))
    norm(jnp.asarray(x))
    expected = 0.9 + 0.1 * x.astype(np.float64).var((0, 1, 2))
    np.testing.assert_allclose(norm.var[...], expected, rtol=1e-7)
    variance = (np.asarray(norm.var[...], np.float64) - 0.9) / 0.1
    np.testing.assert_allclose(variance, (expected - 0.9) / 0.1, atol=2e-6)


def lowered_text(function, platform, *args):
    """The program that another platform, which need not be here, would get."""
    return function.trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("side", "kernel_size", "strides", "padding", "dilation", "as_product"),
    [
        (5, 1, (1, 1), ((0, 0), (0, 0)), 1, True),
        (5, 1, (2, 3), ((0, 0), (0, 0)), 1, True),
        (5, 1, (2, 2), ((1, 0), (0, 2)), 1, True),
        (2, 3, (1, 1), ((1, 1), (1, 1)), 1, True),
        (4, 3, (2, 2), ((1, 1), (1, 1)), 1, True),
        (3, 3, (1, 2), "SAME", 2, True),
        (4, 3, (1, 1), "VALID", 1, True),
        (6, 3, (1, 1), ((1, 1), (1, 1)), 1, False),
        (2, 3, (1, 1), "VALID", 1, False),  # of no output
        (2, 3, (1, 4), ((1, 1), (9, 9)), 1, False),  # of 2x5 outputs, more than the kernel has
    ],
)
def test_convolution_equals_that_of_lax(side, kernel_size, strides, padding, dilation, as_product):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, side, side + 1, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(kernel_size, kernel_size, 3, 4)), jnp.float32)

    def outputs(convolve):
        y, vjp = jax.vjp(
            lambda x, kernel: convolve(
                x,
                kernel,
                strides,
                padding,
                rhs_dilation=(dilation, dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ),
            x,
            kernel,
        )
        return y, *vjp(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    ours = outputs(conv_general_dilated)
    for a, b in zip(ours, outputs(jax.lax.conv_general_dilated), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    convolve = jax.jit(lambda: outputs(conv_general_dilated))
    assert ("stablehlo.convolution" not in lowered_text(convolve, "cpu")) == as_product
    for platform in ("tpu", "cuda"):
        assert "stablehlo.convolution" in lowered_text(convolve, platform)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_convolution_of_nothing_and_of_symbolic_size(kernel_size):
    layer = ConvBN(3, 4, kernel_size, rngs=nnx.Rngs(0))
    layer.eval()
    assert layer(jnp.ones((0, 2, 2, 3))).shape == (0, 2, 2, 4)
    b, h = jax.export.symbolic_shape("b, h")
    image = jax.ShapeDtypeStruct((b, h, h, 3), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: layer(x)))(image)
    assert str(exported.out_avals[0].shape) == "(b, h, h, 4)"


@pytest.mark.parametrize(
    ("platform", "convolutions", "products", "pool_gradient"),
    [
        # Forward and for the kernel each: the stem; in stages of 16, 8 and 4 pixels, not in that
        # of 2, the two 3x3 convolutions. And for the input, of all but the stem.
        ("cpu", 3 * 7 - 1, 3 * (2 + 4 * 4) + 26, False),
        # Elsewhere all 25 are convolutions, and products are the 26 of gates and classifier.
        ("cuda", 3 * 25 - 1, 26, False),
        ("tpu", 3 * 25 - 1, 26, True),
    ],
)
def test_each_platform_has_what_is_fast_there(platform, convolutions, products, pool_gradient):
    model = abstract_model("sc_resnet14", width=8, num_classes=3)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, images):
        return nnx.merge(graphdef, params, rest)(images).sum()

    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    args = (*map(nnx.to_pure_dict, (params, rest)), images)
    program = lowered_text(jax.jit(jax.grad(loss)), platform, *args)
    assert ("select_and_scatter" in program) == pool_gradient
    found = program.count("stablehlo.convolution"), program.count("stablehlo.dot_general")
    assert found == (convolutions, products)


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 4, 2), (1, 1, 2, 1), (6, 5, 2)])
def test_max_pool_equals_that_of_flax(shape):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(4, size=shape), jnp.bfloat16)  # of many equal maxima

    def theirs(x):
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    (ours, our_vjp), (expected, vjp) = (jax.vjp(pool, x) for pool in (max_pool, theirs))
    np.testing.assert_array_equal(ours, expected)
    gradient = jnp.asarray(rng.integers(1, 9, size=ours.shape), jnp.bfloat16)
    np.testing.assert_array_equal(our_vjp(gradient)[0], vjp(gradient)[0])


def test_max_pool_keeps_what_is_not_a_number():
    x = jnp.zeros((1, 4, 4, 2)).at[0, 1, 1, 0].set(jnp.nan)
    np.testing.assert_array_equal(jnp.isnan(max_pool(x)).sum((0, 1, 2)), [4, 0])


def test_max_pool_takes_more_axes_in_front():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5, 2))
    expected = max_pool(x.reshape(6, 4, 5, 2)).reshape(2, 3, 2, 3, 2)
    np.testing.assert_array_equal(max_pool(x), expected)
