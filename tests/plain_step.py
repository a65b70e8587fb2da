"""A training step on images as they are, with what it starts from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from slimconv_jax.devices import data_mesh, replicated
from slimconv_jax.training.step import create_state, make_train_step

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def make_batch(size=16, pixels=8, seed=0):
    """Images of three classes."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, pixels, pixels, 3), dtype=np.uint8),
        "label": rng.integers(0, 3, size).astype(np.int32),
    }


def build(model, optimizer=OPTIMIZER, *, devices=8, ema=False, **options):
    """A step and the state it begins with."""
    mesh = data_mesh(jax.devices()[:devices])
    options = {"augment": lambda key, images, targets: (images, targets)} | options
    step = make_train_step(
        model,
        optimizer,
        lambda step: 0.1 / (1 + step),
        num_classes=3,
        normalize=lambda images: images / 255.0,
        key=jax.random.key(5),
        mesh=mesh,
        **options,
    )
    state = jax.tree.map(jnp.copy, create_state(model, optimizer, ema=ema))  # will be donated
    return step, jax.device_put(state, replicated(mesh))
