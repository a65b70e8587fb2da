"""SlimConv in a Flax Linen model of your own, trained on 8x8 digits with Optax.

python examples/linen_model.py
"""

import jax
import numpy as np
import optax
from flax import linen as nn

import slimconv_jax as sc
from slimconv_jax.data.digits import read_digits

EPOCHS = 10


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        # In place of a 3x3 convolution. It returns fewer channels than it gets, which the
        # 1x1 convolution after it brings to the width that is wanted.
        x = nn.relu(sc.linen.SlimConv(k="4/3", strides=2)(x, train=train))
        x = nn.relu(nn.Conv(64, (1, 1))(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def main():
    data = read_digits()
    images = (data.images[..., None] / 16).astype(np.float32)
    train, test = slice(0, 1536), slice(1536, None)

    model = Net()
    variables = model.init(jax.random.key(0), images[:1])
    params, batch_stats = variables["params"], variables["batch_stats"]
    optimizer = optax.adamw(optax.cosine_decay_schedule(0.01, EPOCHS * 24))
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params, batch_stats, opt_state, images, labels):
        def loss_fn(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates["batch_stats"]

        (loss, batch_stats_new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats_new, opt_state, loss

    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        for batch in rng.permutation(1536).reshape(-1, 64):
            params, batch_stats, opt_state, loss = train_step(
                params, batch_stats, opt_state, images[train][batch], data.labels[train][batch]
            )
        print(f"epoch {epoch + 1}  loss {loss:.3f}")

    logits = model.apply({"params": params, "batch_stats": batch_stats}, images[test])
    right = logits.argmax(axis=-1) == data.labels[test]
    print(f"top-1 of the test images {right.mean():.1%}")


if __name__ == "__main__":
    main()
