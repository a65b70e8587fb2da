"""A Sc-ResNet as the backbone of dense prediction: which digit is at each pixel of a picture.

    python examples/dense_prediction.py

writes dense_prediction.png: pictures, what is there, and what the model sees.
"""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx

import slimconv_jax as sc
from slimconv_jax.data.digits import read_digits

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BACKGROUND = 10
STEPS = 120


class Segmenter(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        # With trained weights: sc.backbone(sc.load_model("sc_resnet50"), output_stride=8).
        classifier = sc.create_model("sc_resnet14", width=16, rngs=rngs)
        self.backbone = sc.backbone(classifier, output_stride=8)
        self.coarse = nnx.Conv(512, 64, (1, 1), rngs=rngs)
        self.fine = nnx.Conv(64, 64, (1, 1), rngs=rngs)
        self.head = nnx.Conv(64, 11, (3, 3), rngs=rngs)

    def __call__(self, images):
        maps = self.backbone.features(images)  # at strides 4, 8, 8 and 8
        fine, coarse = self.fine(maps[0]), self.coarse(maps[-1])
        features = nnx.relu(fine + jax.image.resize(coarse, fine.shape, "bilinear"))
        return jax.image.resize(self.head(features), (*images.shape[:3], 11), "bilinear")


def pictures(rng, digits, count):
    """Four digits, three times as large, in each picture of 64x64 pixels: images and classes."""
    images = np.zeros((count, 64, 64), np.float32)
    classes = np.full((count, 64, 64), BACKGROUND)
    for image, pixels in zip(images, classes, strict=True):
        for top, left in ((0, 0), (0, 32), (32, 0), (32, 32)):
            index = rng.integers(len(digits.labels))
            row, column = top + rng.integers(9), left + rng.integers(9)
            digit = digits.images[index].repeat(3, axis=0).repeat(3, axis=1) / 16
            image[row : row + 24, column : column + 24] = digit
            pixels[row : row + 24, column : column + 24][digit > 0.2] = digits.labels[index]
    return np.repeat(images[..., None], 3, axis=-1), classes


@nnx.jit
def train_step(model, optimizer, images, classes):
    def loss_fn(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), classes)
        return (losses * jnp.where(classes == BACKGROUND, 0.2, 1.0)).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main():
    digits, rng = read_digits(), np.random.default_rng(0)
    model = Segmenter(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.adamw(optax.cosine_decay_schedule(4e-3, STEPS)), wrt=nnx.Param
    )
    for step in range(1, STEPS + 1):
        loss = train_step(model, optimizer, *pictures(rng, digits, 16))
        if step % 25 == 0:
            print(f"step {step}  loss {loss:.3f}", flush=True)

    model.eval()
    images, classes = pictures(rng, digits, 16)
    seen = np.asarray(nnx.jit(Segmenter.__call__)(model, images)).argmax(axis=-1)
    print(f"{(seen == classes)[classes != BACKGROUND].mean():.1%} of the digits' pixels are right")

    _, axes = plt.subplots(3, 4, figsize=(8, 6), layout="constrained")
    for column in range(4):
        axes[0, column].imshow(images[column], cmap="gray")
        axes[1, column].imshow(classes[column], cmap="tab20", vmin=0, vmax=19)
        axes[2, column].imshow(seen[column], cmap="tab20", vmin=0, vmax=19)
    for ax, title in zip(
        axes[:, 0], ("picture", "what is there", "what the model sees"), strict=True
    ):
        ax.set_title(title, loc="left")
    for ax in axes.flat:
        ax.set_axis_off()
    plt.savefig("dense_prediction.png")
    print("wrote dense_prediction.png")


if __name__ == "__main__":
    main()
