import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import daily
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from randomize import apply, randomized

import slimconv_jax as sc
from slimconv_jax.models.zoo import abstract_model

ARCHITECTURE = {"k": 2, "num_classes": 5, "width": 8, "stem": "cifar"}


@pytest.fixture(scope="module")
def converted():
    """A model that came from a PyTorch state dict."""
    model = randomized(lambda: abstract_model("sc_resnet14", **ARCHITECTURE))
    return sc.from_torch(sc.to_torch(model), k=2)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return sc.linen.create_model("sc_resnet14", **ARCHITECTURE)


def test_converted_weights_give_the_same_logits(model, converted, images):
    variables = sc.linen.variables(converted)
    logits = jax.jit(model.apply)(variables, images)
    expected = apply(converted, images)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-6 * np.abs(expected).max(), rtol=0)
    maps = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, images)
    assert [m.shape[1:] for m in maps] == [(16, 16, 32), (8, 8, 64), (4, 4, 128), (2, 2, 256)]


@pytest.mark.long
def test_training_updates_the_statistics_of_a_whole_model(model, converted, images):
    variables = sc.linen.variables(converted)
    train = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    logits, updates = train(variables, images)
    trained = nnx.clone(converted)
    trained.train()
    expected = apply(trained, images)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    expected_stats = flatten_dict(sc.linen.variables(trained)["batch_stats"])
    old_stats, new_stats = map(flatten_dict, (variables["batch_stats"], updates["batch_stats"]))
    assert new_stats.keys() == expected_stats.keys() == old_stats.keys()
    for path, value in new_stats.items():
        np.testing.assert_allclose(value, expected_stats[path], rtol=1e-4, atol=1e-5)
        assert not np.array_equal(value, old_stats[path])


def test_init_makes_the_variables_of_the_nnx_model(model, converted, images):
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    expected = sc.linen.variables(converted)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, expected)
    assert "stages/0/0/conv2/gate/bn/scale" in flatten_dict(shapes["params"], sep="/")


class Net(nn.Module):
    """A network of someone else with two units in it."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(sc.linen.SlimConv(k="4/3", strides=2)(x, train=train))
        x = sc.linen.SlimConv(k=2, padding="VALID", dtype=jnp.bfloat16, name="last")(x, train)
        return nn.Dense(3)(x.mean(axis=(1, 2)))


def test_a_train_step_with_units_in_a_linen_module(images):
    x = np.tile(images, 4)  # 12 channels
    net = Net()
    variables = jax.jit(net.init)(jax.random.key(0), x)
    assert variables.keys() == {"params", "batch_stats"}
    assert variables["params"].keys() == {"SlimConv_0", "last", "Dense_0"}
    assert variables["batch_stats"].keys() == {"SlimConv_0", "last"}
    # 9 channels of the first unit: 3 and 1 of the second.
    assert variables["params"]["Dense_0"]["kernel"].shape == (4, 3)

    @jax.jit
    def train_step(variables):
        def loss_fn(params):
            logits, updates = net.apply(
                variables | {"params": params}, x, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, np.arange(8) % 3)
            return losses.mean(), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.3 * g, variables["params"], grads)
        return loss, {"params": params} | updates

    losses, before = [], variables
    for _ in range(10):
        loss, variables = train_step(variables)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    before, after = map(flatten_dict, (before, variables))
    assert after.keys() == before.keys()
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed >= {path for path in before if path[0] == "batch_stats"}
    assert changed >= {path for path in before if path[-1] == "kernel"}


def test_the_unit_is_that_of_nnx(images):
    x = np.tile(images, 4)
    options = {"reduction": 2, "strides": (2, 1), "kernel_dilation": 2, "squeeze_ratio": 4}
    options |= {"feature_group_count": 3, "lower_feature_group_count": 1}
    unit = randomized(lambda: sc.SlimConv(12, **options, rngs=nnx.Rngs(1)))
    linen_unit = sc.linen.SlimConv(**options, train=False)
    y = jax.jit(linen_unit.apply)(sc.linen.variables(unit), x)
    unit.eval()
    np.testing.assert_allclose(y, apply(unit, x), atol=1e-5)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        unit = sc.linen.SlimConv(
            train=False,
        )
        return unit(x), unit(x)


def test_a_unit_called_twice_is_one():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 8)), jnp.float32)
    (first, second), variables = jax.jit(Twice().init_with_output)(jax.random.key(0), x)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(jax.jit(Twice().apply)(variables, x)[0], first, atol=1e-6)


def test_partitioned_variables_stay_so():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32)
    unit = randomized(lambda: sc.SlimConv(8, rngs=nnx.Rngs(0)))
    boxed = jax.tree.map(
        lambda array: nn.Partitioned(array, (None,) * array.ndim), sc.linen.variables(unit)
    )
    train = functools.partial(sc.linen.SlimConv().apply, train=True, mutable=["batch_stats"])
    _, updates = jax.jit(train)(boxed, x)
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(boxed["batch_stats"])


def test_initial_values_are_drawn_from_the_key():
    unit, x = sc.linen.SlimConv(), jnp.ones((1, 4, 4, 8))
    init = jax.jit(unit.init)
    one, same, other = (init(jax.random.key(seed), x)["params"] for seed in (0, 0, 1))
    kernels = [p["upper"]["conv"]["kernel"] for p in (one, same, other)]
    assert np.array_equal(kernels[0], kernels[1]) and not np.array_equal(kernels[0], kernels[2])
    assert not np.array_equal(one["gate"]["squeeze"]["kernel"][:, 0], one["gate"]["excite"]["bias"])


def test_what_is_refused(model, converted, images):
    variables = sc.linen.variables(converted)
    with pytest.raises(ValueError, match="unknown model 'resnet51'"):
        sc.linen.create_model("resnet51")
    with pytest.raises(ValueError, match="resnet50 has no SlimConv, so it takes no k"):
        sc.linen.create_model("resnet50", k=2)
    with pytest.raises(ValueError, match=r"linen.variables takes an NNX module, not a dict"):
        sc.linen.variables({})
    with pytest.raises(ValueError, match=r"train=True of ResNet .*: pass mutable=\["):
        model.apply(variables, images, train=True)
    with pytest.raises(ValueError, match=r"need batch_stats/.* of shape .*, and there is none"):
        model.apply({"params": variables["params"]}, images)
    wrong = jax.tree.map(lambda x: x[..., :1], variables)
    with pytest.raises(ValueError, match=r"need params/.* of shape .*, and there is \("):
        model.apply(wrong, images)
    with pytest.raises(ValueError, match=r"SlimConv\(3\) at k=4/3 needs at least 4 input channels"):
        sc.linen.SlimConv().init(jax.random.key(0), images)


class Bottleneck(nn.Module):
    """With a slot for the convolutions, as in Flax's ImageNet example."""

    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(8, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(16, (3, 3), (2, 2))(y)))
        return self.norm()(self.conv(features=32, kernel_size=(1, 1))(y))


class ExampleNet(nn.Module):
    """In the manner of Flax's ImageNet example."""

    conv: Any = nn.Conv

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(self.conv, use_bias=False, dtype=jnp.float32)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(conv(16, (3, 3), name="stem")(x)))
        return nn.Dense(3)(Bottleneck(conv, norm)(x).mean((1, 2)))


def init(module, *args, **options):
    """Compiled, since operation by operation takes many times as long."""
    return jax.jit(functools.partial(module.init, **options))(jax.random.key(0), *args)


def run(module, variables, *args, **options):
    return jax.jit(functools.partial(module.apply, **options))(variables, *args)


def paths(tree):
    return flatten_dict(tree, sep="/")


@pytest.fixture(scope="module")
def photos():
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


def test_the_mode_of_a_unit_must_be_told(photos):
    x = jnp.tile(photos, 4)
    unit = sc.linen.SlimConv()
    variables = init(unit, x)
    with pytest.raises(ValueError, match='"train" must be passed to the constructor or at call'):
        unit.apply(variables, x)
    with pytest.raises(ValueError, match='"train" was passed to the constructor and at call time'):
        sc.linen.SlimConv(train=False).apply(variables, x, train=False)
    evaluated = run(unit, variables, x, train=False)
    np.testing.assert_array_equal(run(sc.linen.SlimConv(train=False), variables, x), evaluated)
    _, updates = run(sc.linen.SlimConv(train=True), variables, x, mutable=["batch_stats"])
    before, after = paths(variables["batch_stats"]), paths(updates["batch_stats"])
    assert all((before[path] != after[path]).any() for path in before)


def test_a_unit_takes_what_layers_of_linen_take(photos):
    x = jnp.tile(photos, 4)
    ones = nn.with_partitioning(nn.initializers.ones, (None, None, None, "model"))
    options = {"momentum": 0.5, "epsilon": 1e-3, "axis_name": "batch", "precision": "highest"}
    unit = sc.linen.SlimConv(kernel_init=ones, param_dtype=jnp.bfloat16, train=True, **options)
    variables = init(unit, x)
    kernel = variables["params"]["upper"]["conv"]["kernel"]
    assert kernel.names == (None, None, None, "model") and kernel.value.dtype == jnp.bfloat16
    assert (kernel.value == 1).all()
    apply = functools.partial(unit.apply, mutable=["batch_stats"])
    _, updates = jax.jit(jax.vmap(lambda x: apply(variables, x), axis_name="batch"))(x[:, None])
    for path, value in paths(updates["batch_stats"]).items():
        np.testing.assert_allclose(value[0], value[1], atol=1e-6, err_msg=path)


def test_a_slimmed_convolution_stands_in_the_slot_for_one(photos):
    def net(train):
        return ExampleNet(functools.partial(sc.linen.SlimmedConv, k="4/3", train=train))

    variables = init(net(False), photos)
    plain = init(ExampleNet(), photos)
    slimmed, kept = paths(variables["params"]), paths(plain["params"])
    new = {path for path in slimmed if "/slimconv/" in path or "/project/" in path}
    assert {path.split("/")[1] for path in new} == {"SlimmedConv_1"}
    renamed = {path.replace("SlimmedConv", "Conv") for path in slimmed.keys() - new}
    assert renamed == kept.keys() - {"Bottleneck_0/Conv_1/kernel"}
    assert "Bottleneck_0/SlimmedConv_1/project/bias" not in slimmed
    logits = run(net(False), variables, photos, train=False)
    assert logits.shape == (4, 3)
    _, updates = run(net(True), variables, photos, mutable=["batch_stats"])
    before, after = paths(variables["batch_stats"]), paths(updates["batch_stats"])
    assert all((before[path] != after[path]).any() for path in before) and len(before) == 16
    with pytest.raises(ValueError, match='"train" must be passed to the constructor or at call'):
        net(None).apply(variables, photos, train=False)


def test_slimify_a_network_of_linen(photos):
    net = ExampleNet()
    slim = sc.linen.slimify(net)
    report = slim.report(photos)
    assert list(report.replaced) == [("Bottleneck_0", "Conv_1")]
    assert list(report.left) == [("stem",)]
    assert report.left["stem",].startswith("SlimConv(3) at k=4/3 needs at least 4 input channels")
    variables, plain = (init(n, photos, train=False) for n in (slim, net))
    counts = [sum(x.size for x in jax.tree.leaves(v["params"])) for v in (plain, variables)]
    assert report.params == tuple(counts) and report.macs[1] < report.macs[0]
    assert report.macs == slim.report(photos[:1]).macs  # of an image, however many there are
    assert report.image_shape == (8, 8, 3)
    assert report.replaced["Bottleneck_0", "Conv_1"].params[0] == 9 * 8 * 16
    # What stays has the same paths and the same initial values.
    before, after = paths(plain["params"]), paths(variables["params"])
    assert before.keys() - after.keys() == {"Bottleneck_0/Conv_1/kernel"}
    assert all((before[p] == after[p]).all() for p in before.keys() & after.keys())
    # The mode that the network is told is that of the new batch norms.
    evaluate = jax.jit(functools.partial(slim.apply, train=False))
    np.testing.assert_array_equal(
        evaluate(variables, photos)[0], evaluate(variables, photos.at[1:].set(0))[0]
    )
    _, updates = run(slim, variables, photos, train=True, mutable=["batch_stats"])
    before, after = paths(variables["batch_stats"]), paths(updates["batch_stats"])
    assert before.keys() == after.keys()
    assert all((before[path] != after[path]).any() for path in before)


class Plain(nn.Module):
    """Has no mode."""

    features: int = 8

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "model"))
        return nn.Conv(self.features, (3, 3), kernel_init=init)(x)


def test_what_slimify_says_of_networks_of_linen(photos):
    x = jnp.tile(photos, 4)
    slim = sc.linen.slimify(Plain())
    variables = init(slim, x)
    kernel = variables["params"]["Conv_0"]["project"]["kernel"]
    assert kernel.names == (None, None, None, "model")
    with pytest.raises(
        ValueError, match=r"it is unknown whether the SlimConv that replaces Conv_0 is"
    ):
        slim.apply(variables, x)
    assert run(slim.clone(train=False), variables, x).shape == (4, 8, 8, 8)
    with pytest.warns(UserWarning, match="slimify replaced nothing; Conv_0, for one, is left: Sl"):
        sc.linen.slimify(Plain(1)).report(x)
    for network, options, message in (
        (nn.Dense(3), {}, "slimify: the network has no nn.Conv of 3x3"),
        (Plain(), {"where": lambda *_: False}, r"`where` chooses none of its 1 .*\('Conv_0',\)"),
    ):
        with pytest.raises(ValueError, match=message):
            init(sc.linen.slimify(network, **options), x)
    with pytest.raises(ValueError, match=r"linen.slimify takes a Linen module, not a SlimConv"):
        sc.linen.slimify(sc.SlimConv(8, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="where=3 must be a function"):
        sc.linen.slimify(Plain(), where=3)


class SynchronisedNet(nn.Module):
    """Its batch norm takes the devices' inputs for one batch."""

    @nn.compact
    def __call__(self, x, train: bool):
        norm = nn.BatchNorm(use_running_average=not train, axis_name="batch")
        return norm(nn.Conv(12, (3, 3))(x)).mean((1, 2))


def test_batch_norms_over_devices_stay_so_or_are_refused(photos):
    x = jnp.tile(photos, 4)
    slim = sc.linen.slimify(SynchronisedNet())
    with pytest.raises(ValueError, match=r"use linen.slimify\(module, axis_name='batch'\)"):
        init(slim, x, train=True)
    slim = sc.linen.slimify(SynchronisedNet(), axis_name="batch", momentum=0.5)
    variables = init(slim, x, train=True)
    apply = functools.partial(slim.apply, train=True, mutable=["batch_stats"])
    _, updates = jax.jit(jax.vmap(lambda x: apply(variables, x), axis_name="batch"))(x[:, None])
    for path, value in paths(updates["batch_stats"]).items():
        np.testing.assert_allclose(value[0], value[1], atol=1e-6, err_msg=path)


class Block(nn.Module):
    """Its own batch norm is told the mode by the call, or by an attribute."""

    train: bool | None = None

    @nn.compact
    def __call__(self, x, train: bool | None = None):
        train = nn.merge_param("train", self.train, train)
        return nn.BatchNorm(use_running_average=not train)(nn.Conv(12, (3, 3))(x))


class Around(nn.Module):
    """A block, perhaps transformed."""

    block: Any
    inner: bool | None = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        return self.block(self.inner)(x, *([train] if self.inner is None else []))


def moved(variables, updates):
    before, after = paths(variables["batch_stats"]), paths(updates["batch_stats"])
    return sum(bool((before[path] != after[path]).any()) for path in before)


TRANSFORMS = {
    "none": Block,
    "remat": nn.remat(Block, static_argnums=(2,)),
    "jit": nn.jit(Block, static_argnums=(2,)),
}


@pytest.mark.parametrize("block", daily({"remat"}, TRANSFORMS))
def test_a_network_with_transforms_of_flax_is_slimified(photos, block):
    x = jnp.tile(photos, 4)
    for k, features in (("4/3", 6), ("8/3", 3)):
        slim = sc.linen.slimify(Around(block), k=k)
        variables = init(slim, x)
        (kernel,) = (v for p, v in paths(variables["params"]).items() if "/upper/conv/" in p)
        assert kernel.shape[-1] == features
        for train in (False, True):
            _, updates = run(slim, variables, x, train=train, mutable=["batch_stats"])
            assert moved(variables, updates) == (10 if train else 0)


def test_the_mode_in_an_attribute_counts_and_so_does_what_is_told(photos):
    x = jnp.tile(photos, 4)
    frozen = sc.linen.slimify(Around(Block, inner=False))
    variables = init(frozen, x)
    _, updates = run(frozen, variables, x, train=True, mutable=["batch_stats"])
    assert moved(variables, updates) == 0
    slim = sc.linen.slimify(Around(Block), train=False)
    _, updates = run(slim, variables, x, train=True, mutable=["batch_stats"])
    assert moved(variables, updates) == 10
    assert slim.report(x, False).params == slim.report(x=x).params
    _, updates = slim.apply(
        variables, "__call__", x, jnp.array(True), method="call_method", mutable=["batch_stats"]
    )
    assert moved(variables, updates) == 10


def test_initialisers_of_the_convolution_are_kept(photos):
    options = {"bias_init": nn.initializers.constant(-4.6), "kernel_init": nn.initializers.ones}
    conv = sc.linen.SlimmedConv(12, (3, 3), train=False, **options)
    project = init(conv, jnp.tile(photos, 4))["params"]["project"]
    assert (project["bias"] == -4.6).all() and (project["kernel"] == 1).all()
