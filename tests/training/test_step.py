import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from plain_step import build, make_batch
from randomize import randomized

from slimconv_jax.models.layers import ConvBN
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.training.loss import create_loss
from slimconv_jax.training.optimizer import averaged_params, create_optimizer
from slimconv_jax.training.regularization import draw_scales


class Tiny(nnx.Module):
    """A convolution with batch norm, and a classifier of three classes: compiles in no time."""

    def __init__(self, *, dtype=None, rngs):
        self.conv = ConvBN(3, 8, 3, strides=2, dtype=dtype, rngs=rngs)
        self.classifier = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.classifier(nnx.relu(self.conv(x)).mean(axis=(1, 2)).astype(x.dtype))


def tiny_model(param_dtype=np.float32):
    return randomized(lambda: Tiny(rngs=nnx.Rngs(0)), param_dtype)


def small_model(param_dtype=np.float32, **options):
    options = {"name": "resnet14", "width": 4, "num_classes": 3, "stem": "cifar"} | options
    return randomized(lambda: abstract_model(**options), param_dtype)


def assert_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def reference_gradients(model, images, targets, *, training=True):
    """Loss, logits, gradients, and batch statistics afterwards, in Flax's object style."""
    model = nnx.clone(model)
    model.train() if training else model.eval()

    @nnx.jit
    def gradients(model, images, targets):
        def loss_fn(model):
            logits = model(images)
            return -(jax.nn.log_softmax(logits) * targets).sum(-1).mean(), logits

        return nnx.value_and_grad(loss_fn, has_aux=True)(model)

    (loss, logits), grads = gradients(model, images, targets)
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    return loss, logits, nnx.to_pure_dict(grads), stats


def test_a_step_is_what_its_parts_say():
    model, batch = tiny_model(), make_batch()

    def noise(key, images, targets):
        return images + 2.55 * jax.random.normal(key, images.shape), jnp.roll(targets, 1, axis=0)

    step, state = build(model, augment=noise, loss=create_loss(3, label_smoothing=0.3))
    state, metrics = step(state, batch)

    targets = np.eye(3)[np.roll(batch["label"], 1)]
    images, _ = noise(jax.random.fold_in(jax.random.key(5), 0), batch["image"], targets)
    loss, logits, grads, stats = reference_gradients(model, images / 255, 0.7 * targets + 0.1)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert metrics["accuracy"] == np.mean(np.argmax(logits, -1) == np.roll(batch["label"], 1))
    norm = np.sqrt(sum(np.square(grad).sum() for grad in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert metrics["learning_rate"] == np.float32(0.1)
    assert state.step == 1 and state.ema is None
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), atol=2e-5)
    assert_close(state.batch_stats, stats, atol=2e-5)
    _, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["learning_rate"], 0.05)


def test_steps_compile_once_and_leave_no_host_work_behind():
    step, state = build(tiny_model(), ema=True, ema_decay=0.9)
    batch = {"image": jnp.zeros((8, 8, 8, 3), jnp.uint8), "label": jnp.zeros(8, jnp.int32)}
    for _ in range(3):
        previous = state
        state, metrics = step(state, batch)
    assert step.func._cache_size() == 1
    # The loop hands over plain dicts of arrays. Their memory is used again on TPUs only, since on
    # other platforms XLA would copy them first.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((previous.params, previous.ema)))
    assert type(state.params) is dict
    assert metrics["loss"].sharding.is_fully_replicated


def test_accumulation_equals_one_batch_where_batch_statistics_do_not_enter():
    model, batch = tiny_model(), make_batch(64)
    states, metrics = [], []
    for parts in (1, 4):
        step, state = build(model, devices=4, batch_norm="frozen", accumulation_steps=parts)
        for _ in range(2):
            state, last = step(state, batch)
        states.append(state)
        metrics.append(last)
    assert_close(states[1], states[0], atol=1e-6, rtol=1e-6)
    assert_close(metrics[1], metrics[0], rtol=1e-6)
    # Frozen statistics are those that normalise, and stay.
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert_close(states[0].batch_stats, stats, rtol=0)
    step, state = build(model, batch_norm="frozen")
    _, last = step(state, batch)
    images, targets = batch["image"] / 255, np.eye(3)[batch["label"]]
    loss, *_ = reference_gradients(model, images, targets, training=False)
    np.testing.assert_allclose(last["loss"], loss, rtol=1e-5)


@pytest.mark.long
def test_what_is_left_out_is_drawn_for_each_image_of_each_step():
    # Frozen statistics, so that images do not influence each other.
    model, batch = small_model(), make_batch()

    def draw(key, count):
        return draw_scales(key, count, model.config, drop_path_rate=0.5, dropout_rate=0.2)

    after = []
    for devices, parts in ((1, 1), (8, 1), (2, 4)):
        options = {"devices": devices, "accumulation_steps": parts, "batch_norm": "frozen"}
        step, state = build(model, draw_scales=draw, **options)
        losses = []
        for _ in range(2):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
        after.append((state.params, losses))
    for other in after[1:]:
        assert_close(other, after[0], rtol=1e-4, atol=1e-5)
    still, frozen = build(model, draw_scales=draw, batch_norm="frozen", optimizer=optax.sgd(0.0))
    losses = [still(frozen._replace(step=jnp.int32(n)), batch)[1]["loss"] for n in range(3)]
    assert len(set(map(float, losses))) == 3
    plain, state = build(model, batch_norm="frozen")
    none, _ = build(model, draw_scales=lambda key, count: {}, batch_norm="frozen")
    texts = [s.func.lower(*s.args, state, batch).as_text() for s in (plain, none)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("how", ["accumulation", "per_device"])
def test_statistics_of_parts_of_a_batch(how):
    # In float64. With accumulation, part i has every fourth image from the i-th on; with
    # statistics per device, a device has consecutive images.
    with jax.enable_x64(True):
        model, batch = tiny_model(np.float64), make_batch(32)
        images, targets = batch["image"] / 255, np.eye(3)[batch["label"]]
        if how == "accumulation":
            step, state = build(model, devices=2, accumulation_steps=4)
            parts = [slice(i, None, 4) for i in range(4)]
        else:
            step, state = build(model, devices=4, batch_norm="per_device")
            parts = [slice(8 * i, 8 * i + 8) for i in range(4)]
        state, metrics = step(state, batch)

        losses, gradients, statistics = [], [], []
        reference = nnx.clone(model)
        for part in parts:
            loss, _, grads, stats = reference_gradients(reference, images[part], targets[part])
            losses.append(loss)
            gradients.append(grads)
            statistics.append(stats)
            if how == "accumulation":  # one after the other
                nnx.update(reference, stats)
        mean = jax.tree.map(lambda *grads: np.mean(grads, axis=0), *gradients)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, mean)
        np.testing.assert_allclose(metrics["loss"], np.mean(losses))
        assert_close(state.params, expected, atol=1e-10)
        if how == "accumulation":
            assert_close(state.batch_stats, statistics[-1], atol=1e-10)
        else:
            means = jax.tree.map(lambda *stats: np.mean(stats, axis=0), *statistics)
            assert_close(state.batch_stats, means, atol=1e-10)


def test_both_kinds_of_parts_together():
    with jax.enable_x64(True):
        model, batch = tiny_model(np.float64), make_batch(32)
        options = {"batch_norm": "per_device", "accumulation_steps": 2}
        step, state = build(model, devices=2, **options)
        state, _ = step(state, batch)
        images, targets = batch["image"] / 255, np.eye(3)[batch["label"]]
        gradients = [
            reference_gradients(model, images[part], targets[part])[2]
            for part in (slice(0, 16, 2), slice(1, 16, 2), slice(16, 32, 2), slice(17, 32, 2))
        ]
        mean = jax.tree.map(lambda *grads: np.mean(grads, axis=0), *gradients)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, mean)
        assert_close(state.params, expected, atol=1e-10)


def test_batch_norms_of_flax_see_the_whole_batch_too():
    model, batch = tiny_model(), make_batch()
    model.conv.bn = nnx.BatchNorm(8, axis_name="other", rngs=nnx.Rngs(0))
    outcomes = []
    for devices in (1, 8):
        step, state = build(model, devices=devices)
        outcomes.append(step(state, batch))
    assert_close(*outcomes, rtol=1e-4, atol=1e-6)
    assert model.conv.bn.axis_name == "other"  # the model is not changed
    step, state = build(model, batch_norm="per_device")
    _, metrics = step(state, batch)
    assert abs(float(metrics["loss"]) - float(outcomes[0][1]["loss"])) > 1e-3


def test_the_moving_average():
    step, state = build(tiny_model(), ema=True, ema_decay=0.25)
    expected = jax.tree.map(np.array, state.ema)
    assert_close(expected, state.variables, rtol=0)
    for count in range(1, 5):
        state, _ = step(state, make_batch(seed=count))
        decay = min(0.25, (1 + count) / (10 + count))  # 2/11, 3/12, then 0.25
        now = state.variables
        expected = jax.tree.map(
            lambda e, n, decay=decay: decay * e + (1 - decay) * np.asarray(n), expected, now
        )
        assert_close(state.ema, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(
        state.ema["params"]["classifier"]["bias"], now["params"]["classifier"]["bias"]
    )


def test_the_average_of_an_optimiser_takes_the_place_of_the_moving_one():
    optimizer = create_optimizer(lambda step: 0.1, name="schedule_free_sgd", b1=0.8)
    step, state = build(tiny_model(), optimizer, ema=True, average=averaged_params)
    for _ in range(3):
        state, _ = step(state, make_batch())
    assert_close(state.ema["params"], averaged_params(state.opt_state, state.params), rtol=1e-6)
    assert_close(state.ema["batch_stats"], state.batch_stats, rtol=0)
    kernel = state.params["classifier"]["kernel"]
    assert np.abs(state.ema["params"]["classifier"]["kernel"] - kernel).max() > 1e-4
    with pytest.raises(ValueError, match="ema_decay is not for an optimiser that averages by itse"):
        build(tiny_model(), optimizer, ema=True, average=averaged_params, ema_decay=0.9)


@pytest.mark.long
def test_bfloat16_is_for_the_computation_only():
    model = small_model(name="sc_resnet14", width=8, dtype="bfloat16")
    step, state = build(model, ema=True, ema_decay=0.9)
    program = str(jax.make_jaxpr(step)(state, make_batch()))
    products = [
        line
        for line in program.splitlines()
        if "= conv_general_dilated" in line or "= dot_general" in line
    ]
    assert len(products) > 60  # forward and backward
    wide = [line for line in products if ":bf16[" not in line]
    assert len(wide) == 3 and all(":f32[" in line for line in wide)  # of the classifier
    state, metrics = jax.eval_shape(step, state, make_batch())
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((state, metrics))}
    assert dtypes == {np.dtype("float32"), np.dtype("int32")}


def test_devices_exchange_few_numbers_and_in_float32():
    model = small_model(name="sc_resnet14", width=8, dtype="bfloat16")
    step, state = build(model, devices=4)
    batch = make_batch(pixels=32)  # so that no map has one pixel, as those of the gates
    program = step.func.lower(*step.args, state, batch).as_text()
    sums = re.findall(r"stablehlo.all_reduce.*?\}\) : \((.*?)\) ->", program, re.DOTALL)
    assert sums and all("f32" in types for types in sums)
    # What is not a gradient, the loss or the accuracy: two of each norm, one more of the gates'.
    # The upper and the lower path of a block are normalised together, so there is one less of each.
    norms = [path for path, _ in nnx.iter_graph(model) if path and path[-1] == "bn"]
    gates = sum("gate" in path for path in norms)
    params = len(jax.tree.leaves(state.params))
    assert len(sums) == 2 * (len(norms) - gates) + gates + params + 2


def test_bfloat16_gives_nearly_the_same():
    losses = []
    for dtype in (None, "bfloat16"):
        model = randomized(lambda dtype=dtype: Tiny(dtype=dtype, rngs=nnx.Rngs(0)))
        step, state = build(model)
        losses.append(float(step(state, make_batch())[1]["loss"]))
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps=0 must be an integer >= 1"),
        ({"ema_decay": 1}, "ema_decay=1 must be a number >= 0 and < 1"),
        ({"batch_norm": "local"}, "'local' must be one of 'global', 'per_device', 'frozen'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_model(), **options)


class WithDropout(Tiny):
    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.classifier(self.dropout(nnx.relu(self.conv(x)).mean(axis=(1, 2))))


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_model_with_dropout_draws_anew_in_each_step(accumulation_steps):
    """Its random keys are variables, too, which the state carries on."""
    model = WithDropout(rngs=nnx.Rngs(0))
    step, state = build(
        model, optax.sgd(0.0), ema=True, ema_decay=0.5, accumulation_steps=accumulation_steps
    )
    batch = make_batch()
    counts, losses = [], []
    for _ in range(3):
        counts.append(int(state.variables["other"]["dropout"]["rngs"]["count"]))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert counts == [0, accumulation_steps, 2 * accumulation_steps]
    assert len(set(losses)) == 3
    assert state.ema.keys() == {"params", "batch_stats"}
