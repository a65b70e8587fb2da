"""What users who have JAX's strict settings switched on see: as with Flax's own layers, nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from someone_elses import CallTimeMode

import slimconv_jax as sc
from slimconv_jax.data.preprocessing import normalize
from slimconv_jax.devices import data_mesh
from slimconv_jax.inference.pieces import in_pieces
from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.models.zoo import abstract_model, abstract_resnet
from slimconv_jax.training.augment import augment
from slimconv_jax.training.loss import create_loss
from slimconv_jax.training.optimizer import create_optimizer
from slimconv_jax.training.step import abstract_state, make_train_step

IMAGES = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)


def traced(model, x=IMAGES):
    """The output of a model that is traced anew, which is where JAX is strict."""
    graphdef, state = nnx.split(model)
    return jax.eval_shape(lambda state, x: nnx.merge(graphdef, state)(x), state, x)


def unit():
    x = jax.ShapeDtypeStruct((2, 4, 4, 8), jnp.float32)
    for evaluating in (False, True):
        model = nnx.eval_shape(lambda: sc.SlimConv(8, rngs=nnx.Rngs(0)))
        model = nnx.view(model, use_running_average=evaluating)
        traced(model, x)


def network(**settings):
    model = abstract_model("sc_resnet14", width=8, num_classes=3, **settings)
    assert traced(model).dtype == jnp.float32
    traced(nnx.view(model, use_running_average=True))


def linen():
    model = sc.linen.create_model("sc_resnet14", width=8, num_classes=3)
    jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), IMAGES)


def slimified():
    nnx.eval_shape(lambda: sc.slimify(CallTimeMode(rngs=nnx.Rngs(0)), image_size=8)[0])


def inference():
    model = nnx.view(abstract_model("resnet14", width=8, num_classes=3), use_running_average=True)
    graphdef, state = nnx.split(model)
    prepare = functools.partial(normalize, mean=(0.5,) * 3, std=(0.5,) * 3)

    def forward(state, x):
        return in_pieces(nnx.merge(graphdef, state), x, prepare=prepare, mesh=data_mesh())

    jax.eval_shape(forward, state, jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.uint8))


@pytest.mark.parametrize("promotion", ["rank", "dtype"])
@pytest.mark.parametrize(
    "use",
    [unit, network, functools.partial(network, dtype="bfloat16"), linen, slimified, inference],
    ids=["unit", "network", "bfloat16", "linen", "slimified", "inference"],
)
def test_nothing_is_promoted_silently(use, promotion):
    strict = {"rank": jax.numpy_rank_promotion, "dtype": jax.numpy_dtype_promotion}
    with strict[promotion]("raise" if promotion == "rank" else "strict"):
        use()


BASIC = ResNetConfig((1, 1, 1, 1), block="basic", width=8, num_classes=3)
"""Is traced in a third of the time."""


SLIM = dataclasses.replace(BASIC, block="bottleneck", reduction=2)


def run_step(name, accumulation_steps=1, config=BASIC):
    """The state before and after a training step, in shapes and dtypes."""
    model = abstract_resnet(config)
    schedule = optax.cosine_decay_schedule(0.1, 10)
    optimizer = create_optimizer(schedule, name=name, weight_decay=1e-4, clip_norm=1.0)
    mixes = {"crop_padding": 1, "flip": True, "mixup_alpha": 0.2, "cutmix_alpha": 0.2}
    step = make_train_step(
        model,
        optimizer,
        schedule,
        num_classes=3,
        augment=functools.partial(augment, **mixes),
        normalize=functools.partial(normalize, mean=(0.5,) * 3, std=(0.5,) * 3),
        key=jax.random.key(0),
        mesh=data_mesh(jax.devices()[:1]),
        loss=create_loss(3, label_smoothing=0.1),
        accumulation_steps=accumulation_steps,
        ema_decay=0.9,
    )
    before = abstract_state(model, optimizer, ema=True)
    batch = {
        "image": jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    after, metrics = jax.eval_shape(step.func, *step.args, before, batch)
    return before, after, metrics


@pytest.mark.parametrize(
    ("name", "accumulation_steps"),
    [
        *(("sgd", 1), ("adamw", 1), ("sgd", 2)),
        *(pytest.param(name, 1, marks=pytest.mark.long) for name in ("lars", "lamb")),
    ],
)
def test_a_step_keeps_shapes_and_dtypes_with_x64(name, accumulation_steps):
    # With SlimConv once.
    config = SLIM if (name, accumulation_steps) == ("sgd", 1) else BASIC
    expected, _, _ = run_step(name, accumulation_steps, config)
    with jax.enable_x64(True):
        before, after, _ = run_step(name, accumulation_steps, config)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for one, other, usual in zip(*map(jax.tree.leaves, (before, after, expected)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype) == (usual.shape, usual.dtype)


@pytest.mark.parametrize("name", ["sgd", pytest.param("lamb", marks=pytest.mark.long)])
def test_a_step_promotes_no_rank_silently(name):
    with jax.numpy_rank_promotion("raise"):
        run_step(name, config=SLIM if name == "sgd" else BASIC)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize(
    "build",
    [lambda: sc.SlimConv(8, rngs=nnx.Rngs(0)), lambda: nnx.BatchNorm(8, rngs=nnx.Rngs(0))],
    ids=["SlimConv", "nnx.BatchNorm"],
)
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")
def test_statistics_keep_their_dtype_in_a_loop(build, dtype):
    with jax.enable_x64(True):
        model = nnx.eval_shape(build)
        graphdef, state = nnx.split(model)
        if dtype == jnp.bfloat16:  # all of the state
            state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), state)

        def step(state, x):
            model = nnx.merge(graphdef, state, copy=True)
            y = model(x)
            return nnx.state(model), y

        batches = jax.ShapeDtypeStruct((3, 2, 4, 4, 8), dtype)
        jax.eval_shape(lambda state, x: jax.lax.scan(step, state, x), state, batches)


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", [("jax_debug_nans", "jax_debug_infs"), ("jax_check_tracer_leaks",)]
)
def test_flags_for_debugging_find_nothing(flags):
    before = {flag: getattr(jax.config, flag) for flag in flags}
    for flag in flags:
        jax.config.update(flag, True)
    try:
        model = sc.SlimConv(8, rngs=nnx.Rngs(0))
        x = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32)
        loss, grads = nnx.value_and_grad(lambda model: model(x).sum())(model)
        assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    finally:
        for flag, value in before.items():
            jax.config.update(flag, value)
