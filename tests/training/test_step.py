import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from randomize import randomized

from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.training.augment import augment
from slimconv_jax.training.step import create_state, data_mesh, make_train_step, replicated


def small_model():
    return randomized(lambda: abstract_model("resnet14", width=4, num_classes=3, stem="cifar"))


def prepare(key, images):
    return images / 255.0 + 0.01 * jax.random.normal(key, images.shape)


def test_a_step_is_what_its_parts_say():
    model = small_model()
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8),
        "label": rng.integers(0, 3, 16).astype(np.int32),
    }
    mesh = data_mesh()
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = make_train_step(model, optimizer, preprocess=prepare, key=jax.random.key(5), mesh=mesh)

    # The same in Flax's object style, on one device, without donation.
    images = prepare(jax.random.fold_in(jax.random.key(5), 0), batch["image"])
    reference = nnx.clone(model)
    reference.train()

    @nnx.jit
    def reference_step(reference, images, labels):
        def loss_fn(reference):
            logits = reference(images)
            one_hot = jax.nn.one_hot(labels, 3)
            return -(jax.nn.log_softmax(logits) * one_hot).sum(-1).mean(), logits

        (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(reference)
        params = nnx.state(reference, nnx.Param)
        nnx.update(reference, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        return loss, logits

    loss, logits = reference_step(reference, images, batch["label"])

    state = jax.device_put(create_state(model, optimizer), replicated(mesh))
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert metrics["accuracy"] == np.mean(np.argmax(logits, -1) == batch["label"])
    assert state.step == 1
    for kind, tree in ((nnx.Param, state.params), (nnx.BatchStat, state.batch_stats)):
        expected = nnx.to_pure_dict(nnx.state(reference, kind))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), tree, expected)


def test_steps_compile_once_and_leave_no_host_work_behind():
    model = small_model()
    mesh = data_mesh()
    optimizer = optax.sgd(0.1)
    step = make_train_step(model, optimizer, preprocess=prepare, key=jax.random.key(0), mesh=mesh)
    batch = {"image": jnp.zeros((8, 8, 8, 3), jnp.uint8), "label": jnp.zeros(8, jnp.int32)}
    state = jax.device_put(create_state(model, optimizer), replicated(mesh))
    for _ in range(3):
        previous = state
        state, metrics = step(state, batch)
    assert step._cache_size() == 1
    # The loop hands over plain dicts of arrays, and their memory is used again.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(previous.params))
    assert type(state.params) is dict
    assert metrics["loss"].sharding.is_fully_replicated


def test_the_number_of_devices_does_not_change_the_numbers():
    # In float64, where rounding cannot hide a difference in what is computed: batch
    # statistics, gradients and random numbers of 20 steps.
    rng = np.random.default_rng(0)
    batches = [
        {
            "image": rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8),
            "label": rng.integers(0, 3, 16).astype(np.int32),
        }
        for _ in range(20)
    ]
    losses = []
    with jax.enable_x64(True):
        for devices in (1, 8):
            model = randomized(
                lambda: abstract_model("sc_resnet14", width=8, num_classes=3), np.float64
            )
            mesh = data_mesh(jax.devices()[:devices])
            optimizer = optax.sgd(0.02, momentum=0.9, nesterov=True)
            step = make_train_step(
                model,
                optimizer,
                preprocess=lambda key, images: augment(key, images, crop_padding=4) / 255.0,
                key=jax.random.key(0),
                mesh=mesh,
            )
            state = jax.device_put(create_state(model, optimizer), replicated(mesh))
            losses.append([])
            for batch in batches:
                state, metrics = step(state, batch)
                losses[-1].append(float(metrics["loss"]))
    assert losses[0][-1] != losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-9)
