import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from flax import nnx
from randomize import apply, randomized

from slimconv_jax import create_model
from slimconv_jax.models.zoo import abstract_model


@pytest.mark.parametrize(
    ("name", "stem", "settings"),
    [
        ("sc_resnet14", "cifar", {"reduction": 2}),
        ("sc_resnet14", "imagenet", {"reduction": 3}),
        ("resnet14", "cifar", {"reduction": None}),
        ("resnet18", "imagenet", {"reduction": None, "basic": True}),
    ],
)
def test_logits_equal_numpy(name, stem, settings):
    k = {2: "4/3", 3: "2", None: None}[settings["reduction"]]
    x = np.random.default_rng(1).normal(size=(2, 20, 18, 3))
    with jax.enable_x64(True):
        model = randomized(
            lambda: abstract_model(name, k=k, num_classes=7, stem=stem, width=8), np.float64
        )
        model.eval()
        logits = np.asarray(apply(model, x))
    expected = reference.resnet(x, reference.parameters(model), stem=stem, **settings)
    assert logits.shape == (2, 7)
    assert np.abs(logits - expected).max() <= 1e-12 * np.abs(expected).max()


def test_groups_of_both_paths_equal_numpy():
    with jax.enable_x64(True):
        # The first block of the second stage, whose stride is 2.
        block = randomized(
            lambda: abstract_model("sc_resnext101_32x3d").stages[1][0].conv2, np.float64
        )
        block.eval()
        x = np.random.default_rng(1).normal(size=(1, 4, 4, block.in_features))
        y = np.asarray(apply(block, x))
    expected = reference.slimconv(
        x, reference.parameters(block), 3, strides=2, groups=32, lower_groups=16
    )
    assert np.abs(y - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("stem", "dilation", "strides"),
    [
        ("imagenet", (False, False, False), (4, 8, 16, 32)),
        ("imagenet", (False, False, True), (4, 8, 16, 16)),
        ("imagenet", (False, True, True), (4, 8, 8, 8)),
        ("cifar", (False, False, False), (1, 2, 4, 8)),
    ],
)
def test_feature_maps(stem, dilation, strides):
    model = abstract_model("sc_resnet26", stem=stem, dilation=dilation)
    image = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    maps = nnx.eval_shape(lambda model, x: model.features(x), model, image)
    assert [m.shape for m in maps] == [
        (2, 64 // stride, 96 // stride, channels)
        for stride, channels in zip(strides, (256, 512, 1024, 2048), strict=True)
    ]


def test_dilation_computes_the_strided_maps_more_densely():
    # Where dilation replaces stride, every second output is the strided network's output,
    # away from the border: the parameters mean the same.
    x = np.random.default_rng(0).normal(size=(1, 96, 96, 3)).astype(np.float32)
    maps = []
    for dilated in (False, True):
        model = randomized(
            lambda d=dilated: abstract_model("resnet26", width=8, dilation=(False, False, d))
        )
        model.eval()
        maps.append(nnx.jit(lambda model, x: model.features(x)[-1])(model, x))
    strided, dense = maps
    assert dense.shape[1] == 2 * strided.shape[1]
    np.testing.assert_allclose(dense[:, ::2, ::2], strided, rtol=1e-4, atol=1e-4)


def test_zero_init_residual_starts_every_block_as_its_shortcut():
    @jax.jit  # which leaves out the random numbers, that nobody asks for
    def scales():
        model = create_model("resnet18", width=2, zero_init_residual=True, rngs=nnx.Rngs(0))
        blocks = [block for blocks in model.stages for block in blocks]
        return [(block.conv1.bn.scale[...], block.conv2.bn.scale[...]) for block in blocks]

    assert len(scales()) == 8
    for first, last in scales():
        assert (first == 1).all() and (last == 0).all()


def test_bfloat16_model_has_float32_logits_and_parameters():
    model = abstract_model("sc_resnet14", width=8, num_classes=4, dtype=jnp.bfloat16)
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    maps, logits = nnx.eval_shape(lambda m, x: (m.features(x), m(x)), model, image)
    assert {m.dtype for m in maps} == {jnp.dtype("bfloat16")}
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


@pytest.mark.long
def test_rematerialisation_keeps_less_and_changes_nothing():
    # In float64, since the gradient of few images through many layers makes much of rounding.
    with jax.enable_x64(True):
        compare_rematerialisation(np.random.default_rng(0).normal(size=(4, 32, 32, 3)))


def compare_rematerialisation(x):
    results, kept = [], []
    for remat in (False, True):
        model = randomized(lambda remat=remat: abstract_model("resnet26", width=8, remat=remat))
        graphdef, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
        params, stats = (
            jax.tree.map(lambda leaf: jnp.asarray(leaf, x.dtype), nnx.to_pure_dict(state))
            for state in states
        )

        def loss(params, graphdef=graphdef, stats=stats):
            model = nnx.merge(graphdef, params, stats)
            return jnp.square(model(x)).mean(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

        _, backward, _ = jax.eval_shape(lambda p, f=loss: jax.vjp(f, p, has_aux=True), params)
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (backward, params)]
        kept.append(sizes[0] - sizes[1])
        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    assert kept[1] < 0.6 * kept[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10),
        *(jax.tree.leaves(result) for result in results),
    )


def test_bad_rematerialisation():
    with pytest.raises(ValueError, match="remat='yes' must be True or False"):
        abstract_model("resnet14", remat="yes")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 3, 32, 32), "float32"), ((32, 32, 3), "float32"), ((1, 32, 32, 3), "uint8")],
)
def test_other_images_are_refused(shape, dtype):
    model = abstract_model("resnet14", width=8, stem="cifar")
    with pytest.raises(ValueError, match=r"images must be \(N, H, W, 3\), normalised floats, not"):
        nnx.eval_shape(lambda model: model(jnp.zeros(shape, dtype)), model)
