"""SlimConv put into networks of NNX."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from randomize import apply, randomized
from someone_elses import VGG, CallTimeMode, ModeInAttribute, Synchronised, Wrapped

import slimconv_jax as sc
from slimconv_jax.models.complexity import layers
from slimconv_jax.models.projected import ProjectedSlimConv
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.models.zoo import abstract_model, abstract_resnet, require_resnet


def shapes(model):
    return {path: v.shape for path, v in nnx.to_flat_state(nnx.state(model))}


def arrays(model):
    return {path: np.array(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def vgg():
    return VGG(rngs=nnx.Rngs(0))


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "k", "params", "macs"),
    [
        ("resnet50", "8/3", 12_098_388, 1_880_314_624),
        ("resnet50", "4/3", 16_758_740, 2_652_222_208),
        ("resnext50_32x4d", "4/3", 22_492_512, 3_821_358_080),
    ],
)
def test_a_plain_resnet_becomes_its_sc_counterpart(name, k, params, macs):
    plain, reports = abstract_model(name), []

    def slim():
        model, report = sc.slimify(plain, k=k)
        reports.append(report)
        return model

    slim = nnx.eval_shape(slim)
    counterpart = abstract_model(f"sc_{name}", k=k)
    assert slim.config == counterpart.config
    assert shapes(slim) == shapes(counterpart) and nnx.graphdef(slim) == nnx.graphdef(counterpart)
    (report,) = reports
    assert report.params == (sc.count_params(plain), params)
    assert report.macs == (sc.count_macs(plain), macs)
    assert len(report.replaced) == 16 and not report.left
    assert ("stages", 3, 2, "conv2", "conv") in report.replaced
    path = ("stages", 1, 0, "conv2")
    replaced, unit = report.replaced[*path, "conv"], counterpart.stages[1][0].conv2
    assert replaced.params[1] == sc.count_params(unit)
    macs = [{row.path: row.macs for row in layers(model)} for model in (plain, counterpart)]
    assert replaced.macs == (macs[0][*path, "conv"], macs[1][path])
    assert plain.config.reduction is None


def test_what_is_not_replaced_keeps_its_weights_and_mode():
    config = ResNetConfig((1, 1, 1, 1), width=8, num_classes=3)
    plain = randomized(lambda: abstract_resnet(config))
    plain.eval()
    slim, _ = sc.slimify(plain, rngs=nnx.Rngs(1))
    before, after = arrays(plain), arrays(slim)
    kept = {path for path in before if path in after and before[path].shape == after[path].shape}
    new = {path for path in after if "conv2" in path or path[-3:] == ("conv3", "conv", "kernel")}
    assert kept == after.keys() - new
    assert all(np.array_equal(before[path], after[path]) for path in kept)
    assert slim.stages[0][0].conv2.upper.bn.use_running_average
    variable = slim.stem.conv.kernel
    variable.set_value(variable[...] + 1)  # of the new model alone
    np.testing.assert_array_equal(plain.stem.conv.kernel[...], before["stem", "conv", "kernel"])


def test_a_network_of_someone_else_trains(vgg):
    before = arrays(vgg)
    model, report = sc.slimify(vgg, k="4/3", rngs=nnx.Rngs(1))
    assert list(report.replaced) == [("stages", 0), ("stages", 1)]
    assert model.twice is model.stages[1]
    why = "SlimConv(3) at k=4/3 needs at least 4 input channels and got 3"
    assert report.left["stem",].startswith(why)
    # 16 channels: gate 16 -> 1 -> 16, upper 8, lower 8 -> 4, then 1x1 to 24.
    unit = 16 + 2 + 16 + 16 + 9 * 64 + 16 + 32 + 8 + 9 * 16 + 8 + 12 * 24 + 24
    assert sc.count_params(model.stages[0]) == unit
    replaced = report.replaced["stages", 0]
    assert (replaced.in_features, replaced.out_features) == (16, 24)
    assert replaced.params == (9 * 16 * 24 + 24, unit)
    assert report.params == (sc.count_params(vgg), sc.count_params(model))
    assert report.macs == (sc.count_macs(vgg), sc.count_macs(model))
    shown = str(report)
    assert shown.startswith("2 of 3 3x3 convolutions replaced, k=4/3\n")
    assert f"  stem      left: {why}" in shown and "  stages.0  16 -> 24 channels, par" in shown
    assert f"parameters: {report.params[0]:,} before, {report.params[1]:,} after (-" in shown
    assert "multiply-adds of an image of 224x224x3: " in shown
    assert "note: multiply-adds are not time" in shown

    images = np.random.default_rng(0).normal(size=(16, 12, 12, 3)).astype(np.float32)
    labels = np.arange(16) % 4
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            logits = model(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0] and max(losses[10:]) < losses[0]
    assert all(np.array_equal(before[path], value) for path, value in arrays(vgg).items())


@pytest.mark.parametrize(
    "settings",
    [
        {"strides": (2, 1), "kernel_dilation": 2, "use_bias": False},
        {"padding": "VALID", "feature_group_count": 4, "dtype": jnp.bfloat16},
        {"padding": "CIRCULAR", "precision": "highest", "param_dtype": jnp.bfloat16},
        {"padding": ((0, 2), (1, 0)), "strides": None, "kernel_dilation": None},
    ],
)
def test_the_settings_of_the_convolution_are_honoured(settings):
    conv = nnx.eval_shape(lambda: nnx.Conv(32, 40, (3, 3), **settings, rngs=nnx.Rngs(0)))
    reports = []

    def slim():
        model, report = sc.slimify(nnx.Sequential(conv), image_size=(9, 14, 32))
        reports.append(report)
        return model

    slim = nnx.eval_shape(slim)
    new = slim.layers[0]
    unit, restore = new.slimconv, new.project
    # To its owner it is a convolution.
    assert (new.in_features, new.out_features, new.kernel_size) == (32, 40, (3, 3))
    assert new.strides == (conv.strides or 1) and new.use_bias == conv.use_bias
    for part in (unit.upper.conv, unit.lower.conv):
        for name in ("strides", "padding", "kernel_dilation", "feature_group_count", "precision"):
            mine, theirs = getattr(part, name), getattr(conv, name)
            if name in ("strides", "kernel_dilation"):
                mine, theirs = (np.broadcast_to(x or 1, 2).tolist() for x in (mine, theirs))
            assert mine == theirs
    assert restore.use_bias == conv.use_bias and restore.precision == conv.precision
    assert {unit.gate.squeeze.dtype, unit.upper.conv.dtype, restore.dtype} == {conv.dtype}
    dtypes = {v.dtype for v in jax.tree.leaves(nnx.state(new, nnx.Param))}
    assert dtypes == {jnp.dtype(conv.param_dtype)}
    image = jax.ShapeDtypeStruct((2, 9, 14, 32), jnp.float32)
    expected, found = (nnx.eval_shape(lambda m, x: m(inputs=x), m, image) for m in (conv, new))
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert reports[0].image_shape == (9, 14, 32) and reports[0].macs[0] > reports[0].macs[1]


def stacked():
    """Three convolutions as `nnx.scan` takes them."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Conv(8, 8, (3, 3), rngs=rngs)

    return make(nnx.Rngs(0))


class Standardized(nnx.Conv):
    """A convolution with something of its own."""


def test_what_slimconv_has_not_is_left_and_listed():
    rngs = nnx.Rngs(0)
    strange = {
        "takes SlimConv's place": nnx.Conv(8, 8, (3, 3), rngs=rngs),
        "it is a Standardized, not an nnx.Conv itself": Standardized(8, 8, (3, 3), rngs=rngs),
        "it has an input dilation, which SlimConv does not have": nnx.Conv(
            8, 8, (3, 3), input_dilation=(1, 2), rngs=rngs
        ),
        "it has a mask, which": nnx.Conv(8, 8, (3, 3), mask=jnp.ones((3, 3, 8, 8)), rngs=rngs),
        "it has parameters of several layers, which": stacked(),
        "it is in a WeightNorm, which changes": nnx.WeightNorm(
            nnx.Conv(8, 8, (3, 3), rngs=rngs), rngs=rngs
        ),
        "it has its own promote_dtype, which": nnx.Conv(
            8, 8, (3, 3), promote_dtype=lambda x, dtype: x, rngs=rngs
        ),
        "SlimConv would have 244 parameters instead of 146": nnx.Conv(8, 2, (3, 3), rngs=rngs),
        "would have 69,888 multiply-adds per output pixel instead of 64,512": nnx.Conv(
            128, 56, (3, 3), strides=(3, 3), rngs=rngs
        ),
        "not divisible by 8 groups": nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs),
    }
    model, report = sc.slimify(nnx.Sequential(*strange.values()))
    assert list(report.replaced) == [("layers", 0)]
    for (path, why), part in zip(report.left.items(), list(strange)[1:], strict=True):
        assert part in why and type(model.layers[path[1]]) is type(strange[part])
    assert report.macs is None and "multiply-adds of" not in str(report)  # it takes 8 channels


def test_where_chooses(vgg):
    seen = {}

    def where(path, conv):
        seen[path] = conv.out_features
        return conv.out_features == 32

    model, report = sc.slimify(vgg, k=2, where=where)
    assert seen == {("stem",): 16, ("stages", 0): 24, ("stages", 1): 32}
    assert list(report.replaced) == [("stages", 1)] and not report.left
    assert report.not_chosen == (("stages", 0), ("stem",))
    assert str(report).startswith("1 of 3 3x3 convolutions replaced, k=2\n")
    assert type(model.stages[0]) is nnx.Conv


def test_a_resnet_changed_in_part_is_no_named_one_any_more(tmp_path):
    config = ResNetConfig((1, 1, 1, 2), width=8, num_classes=3)
    plain = randomized(lambda: abstract_resnet(config))
    partly, _ = sc.slimify(plain, where=lambda path, conv: path[1:3] == (3, 1))
    x = np.ones((1, 32, 32, 3), np.float32)
    assert apply(partly, x).shape == (1, 3) and partly.config.reduction is None
    for model in (partly, sc.fold_batch_norm(plain)):
        for use in (lambda m: sc.save_model(m, tmp_path / "model"), sc.to_torch, sc.backbone):
            with pytest.raises(ValueError, match=r"this one was changed \(batch norm folded"):
                use(model)
    assert not list(tmp_path.iterdir())


def test_what_slimify_refuses(vgg):
    sc_model = abstract_model("sc_resnet14")
    for arguments, message in (
        ((vgg, "1"), "k='1' is not a compression ratio"),
        ((sc.linen.SlimConv(),), "slimify takes an NNX module, not a Linen SlimConv"),
        ((nnx.Linear(2, 2, rngs=nnx.Rngs(0)),), "slimify: the model has no nnx.Conv of 3x3"),
        ((sc_model,), "slimify: the model has no nnx.Conv of 3x3 outside of SlimConvs"),
        (
            (vgg, 2, lambda *_: False),
            "slimify: `where` chooses none of its 3 3x3 convolutions, such as ('stages', 0)",
        ),
        ((vgg, 2, "stages"), "slimify: where='stages' must be a function of a path and a"),
        ((vgg, 2, None, (8, 8, 5)), "the model does not take an image of 8x8x5: "),
        ((vgg, 2, None, (8, 8)), "image_size=(8, 8) must be an integer, or (H, W, C)"),
    ):
        names = ("model", "k", "where", "image_size")
        with pytest.raises(ValueError) as error:
            sc.slimify(**dict(zip(names, arguments, strict=False)))
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.long
def test_slimified_in_parts_a_resnet_has_the_config_of_whole_stages():
    config = ResNetConfig((1, 1, 1, 1), width=8)

    def build():
        half, _ = sc.slimify(abstract_resnet(config), k=2, where=lambda path, _: path[1] < 2)
        return half, *(sc.slimify(half, k=k)[0] for k in (2, "8/3"))

    half, whole, mixed = nnx.eval_shape(build)
    of_half = dataclasses.replace(config, reduction=3, sc_stages=(True, True, False, False))
    assert half.config == of_half and whole.config == dataclasses.replace(config, reduction=3)
    for model in (half, whole):
        require_resnet(model, "the test")
    with pytest.raises(ValueError, match="this one was changed"):
        require_resnet(mixed, "the test")


class Borrowed(nnx.Module):
    """A convolution of a ResNet, which is found here before it is found there."""

    def __init__(self):
        net = abstract_resnet(ResNetConfig((1, 1, 1, 1), width=8, num_classes=3))
        self.a, self.net = net.stages[0][0].conv2, net

    def __call__(self, x):
        return self.net(x)


def test_a_convolution_of_a_bottleneck_that_is_found_elsewhere_first():
    slim = nnx.eval_shape(lambda: sc.slimify(Borrowed(), image_size=32)[0])
    unit = slim.net.stages[0][0].conv2.conv
    assert isinstance(unit, ProjectedSlimConv) and slim.a.conv is unit
    assert isinstance(slim.net.stages[1][0].conv2, sc.SlimConv)


def test_nothing_replaced_is_a_warning():
    conv = nnx.Conv(128, 32, (3, 3), rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="slimify replaced nothing; the model itself, for one, is"):
        model, report = sc.slimify(conv, image_size=(8, 8, 128))
    assert report.params[0] == report.params[1] and type(model) is nnx.Conv
    assert str(report).startswith("0 of 1 3x3 convolutions replaced")


def moved(model, call):
    """Which batch statistics a call moves, and what it returns."""
    before = {
        path: np.array(v[...]) for path, v in nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    }
    output = call(model)
    after = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    return {path for path, v in after if not np.array_equal(before[path], v[...])}, output


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


def test_the_mode_that_a_call_tells_reaches_the_new_layers(images):
    model, report = sc.slimify(CallTimeMode(rngs=nnx.Rngs(0)))
    assert type(model).__name__ == "CallTimeMode" and isinstance(model, CallTimeMode)
    assert "follow the mode in calls of CallTimeMode(training=)" in str(report)
    call = nnx.jit(lambda model, x, training: model(x, training), static_argnums=2)

    def evaluated(model):
        return call(model, images, False)

    unmoved, together = moved(model, evaluated)
    assert not unmoved
    alone = call(model, images.at[1:].set(0.0), False)
    np.testing.assert_array_equal(together[0], alone[0])
    trained, _ = moved(model, lambda model: call(model, images, True))
    assert len(trained) == 2 + 2 * 4  # its own batch norm, and those of the gate and three paths
    # The call counts more than `train` and `eval`.
    model.eval()
    assert len(moved(model, lambda model: call(model, images, True))[0]) == 10
    assert nnx.graphdef(sc.slimify(CallTimeMode(rngs=nnx.Rngs(0)))[0]) == nnx.graphdef(
        sc.slimify(CallTimeMode(rngs=nnx.Rngs(0)))[0]
    )


@pytest.mark.parametrize("train", [pytest.param(True, marks=pytest.mark.long), False])
def test_the_innermost_module_that_is_told_a_mode_counts(images, train):
    model, _ = sc.slimify(Wrapped(rngs=nnx.Rngs(0)))
    assert bool(moved(model, lambda model: model(images, train))[0]) == train
    assert bool(moved(model, lambda model: model(train=train, x=images))[0]) == train
    method = moved(model, lambda model: model.inner.encode(images, not train))[0]
    assert bool(method) == train


def test_a_mode_that_the_new_layers_do_not_hear_is_noted():
    _, report = sc.slimify(ModeInAttribute(rngs=nnx.Rngs(0)), image_size=8)
    assert "bn, a BatchNorm, gets its mode from the module that calls it" in str(report)
    _, report = sc.slimify(Synchronised(rngs=nnx.Rngs(0)), image_size=8)
    assert "gets its mode" not in str(report) and "follow" not in str(report)


def test_a_model_that_gets_state_is_told_so(vgg):
    _, report = sc.slimify(Wrapped(rngs=nnx.Rngs(0)), image_size=8)
    assert "note: the model had no batch statistics and has some now" in str(report)
    assert "had no batch statistics" not in str(sc.slimify(vgg)[1])


@pytest.mark.long
def test_batch_norms_have_the_settings_of_the_models(images):
    model, report = sc.slimify(Synchronised(rngs=nnx.Rngs(0)), image_size=8)
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
    assert {(m.momentum, m.epsilon, m.axis_name) for m in norms} == {(0.7, 1e-3, "batch")}
    graphdef, state = nnx.split(model)

    def statistics(x):
        model = nnx.merge(graphdef, state, copy=True)
        model(x)
        return nnx.state(model, nnx.BatchStat)

    found = jax.vmap(statistics, axis_name="batch")(images.reshape(2, 2, 8, 8, 3))
    for path, variable in nnx.to_flat_state(found):
        np.testing.assert_allclose(variable[...][0], variable[...][1], atol=1e-6, err_msg=str(path))
    other = nnx.Sequential(
        nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)),
        nnx.BatchNorm(8, momentum=0.5, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(8, momentum=0.6, rngs=nnx.Rngs(0)),
    )
    model, report = sc.slimify(other, image_size=(4, 4, 8))
    assert "differ in momentum, such as 0.5 and 0.6" in str(report)
    assert model.layers[0].slimconv.upper.bn.momentum == 0.9


def test_a_sharding_goes_on():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = (None, None, None, "model")
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), spec, mesh)
    conv = nnx.Conv(8, 8, (3, 3), kernel_init=init, rngs=nnx.Rngs(0))
    model, _ = sc.slimify(nnx.Sequential(conv), image_size=(4, 4, 8))
    for kernel in (model.layers[0].project.kernel, model.layers[0].slimconv.upper.conv.kernel):
        assert kernel.get_metadata()["out_sharding"] == spec
        assert kernel[...].sharding.spec == jax.sharding.PartitionSpec(*spec)


def test_steps_are_timed_where_asked(vgg):
    _, report = sc.slimify(vgg, image_size=12, time=True)
    assert all(seconds > 0 for seconds in report.seconds) and len(report.seconds) == 2
    assert "seconds of a training step here: " in str(report) and "are not time" not in str(report)


def test_slimified_twice_is_slimified_once(images):
    once, _ = sc.slimify(CallTimeMode(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"the model has no nnx.Conv of 3x3 outside of Sl"):
        sc.slimify(once)
    folded = sc.fold_batch_norm(once)
    np.testing.assert_allclose(folded(images), once(images, training=False), atol=1e-5)
    assert isinstance(once.conv, ProjectedSlimConv)


class DropoutMode(ModeInAttribute):
    """Is told the mode of dropout, and, if at all, that of batch norm by another argument."""

    def __call__(self, x, deterministic=True, use_running_average=None):
        return self.bn(self.conv1(self.conv(x)), use_running_average=use_running_average)


@pytest.mark.long
def test_the_mode_of_dropout_is_not_that_of_batch_norm(images):
    model, _ = sc.slimify(DropoutMode(rngs=nnx.Rngs(0)), image_size=8)
    assert len(moved(model, lambda m: m(images))[0]) == 10
    model.eval()
    assert not moved(model, lambda m: m(images, deterministic=False))[0]


@pytest.mark.parametrize("mode", [0, np.False_, jnp.array(False)])
def test_modes_are_of_any_type(images, mode):
    model, _ = sc.slimify(CallTimeMode(rngs=nnx.Rngs(0)), image_size=8)
    assert not moved(model, lambda m: m(images, mode))[0]
    with pytest.raises(ValueError, match="the mode training is traced; SlimConv needs it static"):
        nnx.jit(lambda m, x, training: m(x, training))(model, images, True)


def test_a_slimified_model_pickles(images):
    model, _ = sc.slimify(CallTimeMode(rngs=nnx.Rngs(0)), image_size=8)
    back = pickle.loads(pickle.dumps(model))
    assert type(back) is type(model)
    np.testing.assert_array_equal(back(images), model(images))


def test_a_bias_keeps_its_values():
    init = nnx.initializers.constant(-4.6)
    conv = nnx.Conv(8, 8, (3, 3), bias_init=init, rngs=nnx.Rngs(0))
    model, _ = sc.slimify(nnx.Sequential(conv), image_size=(4, 4, 8))
    assert (model.layers[0].bias[...] == jnp.float32(-4.6)).all()
