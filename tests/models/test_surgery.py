"""slimify, fold_batch_norm and backbone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from randomize import apply, randomized

import slimconv_jax as sc
from slimconv_jax.models.layers import ConvBN
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.models.zoo import ARCHITECTURES, abstract_model, abstract_resnet


class VGG(nnx.Module):
    """Someone else's network, plain."""

    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.stages = nnx.List(
            [
                nnx.Conv(16, 24, (3, 3), rngs=rngs),
                nnx.Conv(24, 32, (3, 3), strides=2, padding="VALID", rngs=rngs),
            ]
        )
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.twice = self.stages[1]  # one convolution in two places
        self.head = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for conv in self.stages:
            x = nnx.relu(conv(x))
        return self.head(self.norm(x).mean(axis=(1, 2)))


def shapes(model):
    return {path: v.shape for path, v in nnx.to_flat_state(nnx.state(model))}


def arrays(model):
    return {path: np.array(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def vgg():
    return VGG(rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "k", "params", "macs"),
    [
        ("resnet50", "4/3", 16_758_740, 2_652_222_208),
        ("resnet50", "8/3", 12_098_388, 1_880_314_624),
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
    assert report.params == (sc.count_params(vgg), sc.count_params(model))
    assert report.macs == (sc.count_macs(vgg), sc.count_macs(model))
    shown = str(report)
    assert shown.startswith("2 of 3 3x3 convolutions replaced, k=4/3\n")
    assert f"  stem      left: {why}" in shown and "  stages.0  16 -> 24 channels\n" in shown
    assert f"parameters: {report.params[0]:,} before, {report.params[1]:,} after (-" in shown
    assert "multiply-adds of an image of 224x224x3: " in shown

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
        {"padding": "CIRCULAR", "precision": "highest"},
        {"padding": ((0, 2), (1, 0)), "strides": None, "kernel_dilation": None},
    ],
)
def test_the_settings_of_the_convolution_are_honoured(settings):
    conv = nnx.eval_shape(lambda: nnx.Conv(32, 20, (3, 3), **settings, rngs=nnx.Rngs(0)))
    reports = []

    def slim():
        model, report = sc.slimify(nnx.Sequential(conv), image_size=(9, 14, 32))
        reports.append(report)
        return model

    slim = nnx.eval_shape(slim)
    unit, _, restore = slim.layers[0].layers
    for part in (unit.upper.conv, unit.lower.conv):
        for name in ("strides", "padding", "kernel_dilation", "feature_group_count", "precision"):
            mine, theirs = getattr(part, name), getattr(conv, name)
            if name in ("strides", "kernel_dilation"):
                mine, theirs = (np.broadcast_to(x or 1, 2).tolist() for x in (mine, theirs))
            assert mine == theirs
    assert restore.use_bias == conv.use_bias and restore.precision == conv.precision
    assert {unit.gate.squeeze.dtype, unit.upper.conv.dtype, restore.dtype} == {conv.dtype}
    image = jax.ShapeDtypeStruct((2, 9, 14, 32), jnp.float32)
    expected, found = (nnx.eval_shape(lambda m, x: m(x), m, image) for m in (conv, slim))
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
        "it has an input dilation, which SlimConv has not": nnx.Conv(
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
        "it has parameters of bfloat16, which": nnx.Conv(
            8, 8, (3, 3), param_dtype=jnp.bfloat16, rngs=rngs
        ),
        "not divisible by 8 groups": nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs),
    }
    model, report = sc.slimify(nnx.Sequential(*strange.values()))
    assert list(report.replaced) == [("layers", 0)]
    for (path, why), part in zip(report.left.items(), list(strange)[1:], strict=True):
        assert part in why and type(model.layers[path[1]]) is type(strange[part])
    assert report.macs is None and "multiply-adds" not in str(report)  # it takes 8 channels


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
    config = ResNetConfig((1, 1, 1, 1), width=8, num_classes=3)
    plain = randomized(lambda: abstract_resnet(config))
    partly, _ = sc.slimify(plain, where=lambda path, conv: path[1] == 3)
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
        ((vgg, 2, None, (8, 8, 5)), "the model takes no image of 8x8x5: "),
        ((vgg, 2, None, (8, 8)), "image_size=(8, 8) must be an integer, or (H, W, C)"),
    ):
        names = ("model", "k", "where", "image_size")
        with pytest.raises(ValueError) as error:
            sc.slimify(**dict(zip(names, arguments, strict=False)))
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


def compare_folded(model, size, tolerance=1e-5):
    model.eval()
    folded = sc.fold_batch_norm(model)
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    expected = np.asarray(apply(model, x))
    assert np.abs(apply(folded, x) - expected).max() <= tolerance * np.abs(expected).max()
    assert not nnx.state(folded, nnx.BatchStat)
    return model, folded


def small_sc():
    groups = {"groups": 2, "base_width": 32, "reduction": 3, "lower_groups": 1}
    return abstract_resnet(ResNetConfig((1, 1, 1, 1), width=12, **groups))


def small_slimified():
    """Basic blocks, where SlimConv and a 1x1 convolution stand before a batch norm."""
    config = ResNetConfig((1, 1, 1, 1), block="basic", width=8, stem="cifar")
    return sc.slimify(abstract_resnet(config))[0]


@pytest.mark.parametrize("build", [small_sc, small_slimified])
def test_folding_batch_norm_changes_nothing_but_its_presence(build):
    model = randomized(build)
    before = arrays(model)
    model, folded = compare_folded(model, 32)
    assert all(np.array_equal(before[path], value) for path, value in arrays(model).items())
    x = jnp.zeros((1, 32, 32, 3))
    for net, count in ((model, True), (folded, False)):
        program = nnx.jit(lambda m, x: m(x)).lower(net, x).as_text()
        assert ("rsqrt" in program) == count  # of batch norm alone
    assert not any(isinstance(module, ConvBN) for _, module in nnx.iter_modules(folded))


def test_folded_kernels_have_the_dtype_of_the_computation_and_give_the_same_bits():
    config = small_sc().config
    single, half = (
        sc.fold_batch_norm(randomized(lambda dtype=dtype: abstract_resnet(config, dtype=dtype)))
        for dtype in (None, "bfloat16")
    )
    for path, value in arrays(half).items():
        whole = {"excite", "classifier"} & set(path)  # have no batch norm after them
        assert value.dtype == (jnp.float32 if whole else jnp.bfloat16), path
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    rounded_at_use = nnx.merge(nnx.graphdef(half), nnx.state(single))
    np.testing.assert_array_equal(apply(half, x), apply(rounded_at_use, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_member_of_the_family_folds(name):
    model = randomized(lambda: abstract_model(name))
    for stage in model.stages:
        for block in stage:
            last = block.conv3 if hasattr(block, "conv3") else block.conv2
            for _, bn in nnx.iter_modules(last):
                if isinstance(bn, nnx.BatchNorm):  # as deep trained networks have it
                    bn.scale.set_value(0.3 * bn.scale[...])
    compare_folded(model, 64)


class Several(nnx.Module):
    """Adds up what several modules make of one input."""

    def __init__(self, *modules):
        self.modules = nnx.List(modules)

    def __call__(self, x):
        return sum(module(x) for module in self.modules)


def test_folding_with_one_convolution_under_two_batch_norms():
    def build():
        one, other, third = (ConvBN(4, 4, 3, rngs=nnx.Rngs(0)) for _ in range(3))
        other.conv = one.conv
        third.conv.kernel = one.conv.kernel
        return Several(one, other, third, one.conv)

    model = randomized(build)
    model.eval()
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(sc.fold_batch_norm(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_folding_stacked_units():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return sc.SlimConv(8, rngs=rngs)

    def units(model, x):
        return nnx.vmap(lambda unit, x: unit(x), in_axes=(0, None))(model, x)

    model = randomized(lambda: make(nnx.Rngs(0)))
    model.eval()
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 8)).astype(np.float32)
    np.testing.assert_allclose(units(sc.fold_batch_norm(model), x), units(model, x), atol=1e-5)


def test_what_flax_cannot_change_is_refused():
    conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    in_a_tuple, in_itself = Several(conv), Several(conv)
    in_a_tuple.pair = nnx.data((conv, [conv]))
    in_itself.modules.append(in_itself)
    for model in (in_a_tuple, in_itself):
        with pytest.raises(ValueError, match="slimify cannot change a model with modules in tupl"):
            sc.slimify(model)
    unit = nnx.eval_shape(lambda: sc.SlimConv(8, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="fold_batch_norm needs the values of the parameters"):
        sc.fold_batch_norm(unit)


def test_slimified_in_parts_a_resnet_has_the_config_of_none():
    config = ResNetConfig((1, 1, 1, 1), width=8)

    def build():
        half, _ = sc.slimify(abstract_resnet(config), k=2, where=lambda path, _: path[1] < 2)
        return [sc.slimify(half, k=k)[0] for k in (2, "8/3")]

    whole, mixed = nnx.eval_shape(build)
    assert whole.config.reduction == 3 and mixed.config.reduction is None


def test_folding_leaves_the_batch_norm_of_others(vgg):
    slim = randomized(lambda: sc.slimify(vgg)[0])
    slim.eval()
    folded = sc.fold_batch_norm(slim)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(apply(folded, x), apply(slim, x), atol=1e-5)
    left = nnx.to_flat_state(nnx.state(folded, nnx.BatchStat))
    assert [path for path, _ in left] == [("norm", "mean"), ("norm", "var")]
    for model, message in ((vgg, "no batch norm of a ResNet or SlimConv"), (3, "not a int")):
        with pytest.raises(ValueError, match=message):
            sc.fold_batch_norm(model)
    with pytest.raises(ValueError, match="no batch norm of a ResNet or SlimConv"):
        sc.fold_batch_norm(folded)


def test_a_backbone_has_the_weights_on_denser_maps():
    config = ResNetConfig((1, 1, 1, 2), width=8, num_classes=3)
    model = randomized(lambda: abstract_resnet(config))
    model.eval()
    dense = sc.backbone(model, output_stride=8)
    assert dense.config == dataclasses.replace(config, num_classes=0, dilation=(False, True, True))
    features = nnx.jit(lambda model, x: (model.features(x), model(x)))
    x = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    (maps, _), (dense_maps, pooled) = features(model, x), features(dense, x)
    assert [m.shape[1] for m in dense_maps] == [16, 8, 8, 8]
    for one, other, stride in zip(maps, dense_maps, (1, 1, 2, 4), strict=True):
        np.testing.assert_allclose(one, other[:, ::stride, ::stride], atol=1e-4)
    np.testing.assert_allclose(pooled, dense_maps[-1].mean((1, 2)), rtol=1e-5)
    assert sc.backbone(dense).config == dense.config
    assert sc.backbone(dense, output_stride=32).config.dilation == (False, False, False)
    cifar = abstract_resnet(dataclasses.replace(config, stem="cifar"))
    assert sc.backbone(cifar, output_stride=4).config.dilation == (False, False, True)
    with pytest.raises(ValueError, match="output_stride=12 must be one of 32, 16, 8, 4"):
        sc.backbone(model, output_stride=12)
    with pytest.raises(ValueError, match="backbone takes a slimconv_jax ResNet, not a int"):
        sc.backbone(3)


def test_without_classes_a_model_pools():
    model = abstract_model("resnet14", num_classes=0, width=8)
    whole = abstract_model("resnet14", num_classes=7, width=8)
    assert sc.count_params(whole) - sc.count_params(model) == 7 * 256 + 7
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.bfloat16)
    pooled = nnx.eval_shape(lambda model, image: model(image), model, image)
    assert pooled.shape == (2, 256) and pooled.dtype == jnp.float32
