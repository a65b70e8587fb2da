import jax.numpy as jnp
import numpy as np
import pytest
import torch

from slimconv_jax.training.loss import create_loss


def example(classes=7):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, classes)).astype(np.float32)
    targets = rng.dirichlet(np.ones(classes), 5).astype(np.float32)
    return logits, targets


def losses_of(logits, targets, **options):
    return create_loss(logits.shape[1], **options)(jnp.array(logits), jnp.array(targets))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_cross_entropy_is_that_of_pytorch(label_smoothing):
    logits, targets = example()
    for weights in ((), (0.5, 1, 2, 0, 1, 3, 1)):
        expected = torch.nn.functional.cross_entropy(
            torch.tensor(logits),
            torch.tensor(targets),
            weight=torch.tensor(weights, dtype=torch.float32) if weights else None,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        options = {"label_smoothing": label_smoothing, "class_weights": weights}
        np.testing.assert_allclose(losses_of(logits, targets, **options), expected, rtol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
@pytest.mark.parametrize("weights", [(), (0.5, 1, 2, 0, 1, 3, 1)])
def test_binary_cross_entropy_is_that_of_pytorch(label_smoothing, threshold, weights):
    logits, targets = example()
    targets[0] = np.eye(7)[3]  # an image that is not mixed
    wanted = torch.tensor(targets)
    if threshold is not None:
        wanted = (wanted > threshold).float()
    wanted = (1 - label_smoothing) * wanted + label_smoothing / 7
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits),
        wanted,
        weight=torch.tensor(weights) if weights else None,
        reduction="none",
    ).mean(dim=1)
    losses = losses_of(
        logits,
        targets,
        loss="binary_cross_entropy",
        label_smoothing=label_smoothing,
        target_threshold=threshold,
        class_weights=weights,
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must be a number >= 0 and < 1"),
        ({"loss": "mse"}, "loss='mse' must be one of 'cross_entropy', 'binary_cross_entropy'"),
        ({"target_threshold": 0.2}, "target_threshold is for loss='binary_cross_entropy'"),
        (
            {"target_threshold": 1, "loss": "binary_cross_entropy"},
            "target_threshold=1 must be a number >= 0 and < 1",
        ),
        ({"class_weights": (1, 2)}, "class_weights has 2 numbers; it must have 7, one for each"),
        ({"class_weights": (0,) * 7}, "not all 0"),
        ({"class_weights": (1,) * 6 + (-1,)}, "class_weights=-1 must be a number >= 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        create_loss(7, **options)
