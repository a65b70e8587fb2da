"""SlimConv in a Flax NNX model of your own, trained on 8x8 digits with Optax.

python examples/nnx_model.py
"""

import numpy as np
import optax
from flax import nnx

import slimconv_jax as sc
from slimconv_jax.data.digits import read_digits

EPOCHS = 10


class Net(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        # In place of a 3x3 convolution. It returns fewer channels than it gets, which the
        # 1x1 convolution after it brings to the width that is wanted.
        self.unit = sc.SlimConv(32, k="4/3", strides=2, rngs=rngs)
        self.project = nnx.Conv(self.unit.out_features, 64, (1, 1), rngs=rngs)
        self.classifier = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        x = nnx.relu(self.unit(x))  # SlimConv has no activation of its own
        x = nnx.relu(self.project(x))
        return self.classifier(x.mean(axis=(1, 2)))


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_fn(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main():
    data = read_digits()
    images = (data.images[..., None] / 16).astype(np.float32)
    train, test = slice(0, 1536), slice(1536, None)

    model = Net(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.adamw(optax.cosine_decay_schedule(0.01, EPOCHS * 24)), wrt=nnx.Param
    )
    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        for batch in rng.permutation(1536).reshape(-1, 64):
            loss = train_step(model, optimizer, images[train][batch], data.labels[train][batch])
        print(f"epoch {epoch + 1}  loss {loss:.3f}")

    model.eval()  # batch norm now takes its running statistics
    right = model(images[test]).argmax(axis=-1) == data.labels[test]
    print(f"{sc.count_params(model):,} parameters, top-1 of the test images {right.mean():.1%}")


if __name__ == "__main__":
    main()
