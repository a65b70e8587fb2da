import jax.numpy as jnp
import numpy as np
import pytest
import torch

from slimconv_jax.training.loss import create_loss


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_cross_entropy_is_that_of_pytorch(label_smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 7)).astype(np.float32)
    targets = rng.dirichlet(np.ones(7), 5).astype(np.float32)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits),
        torch.tensor(targets),
        label_smoothing=label_smoothing,
        reduction="none",
    )
    losses = create_loss(label_smoothing=label_smoothing)(jnp.array(logits), jnp.array(targets))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"label_smoothing=1.0 must be a number >= 0 and < 1"):
        create_loss(label_smoothing=1.0)
