import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slimconv_jax.training.optimizer import create_optimizer

SETTINGS = {
    "learning_rate": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 0.01,
    "warmup_epochs": 2.0,
    "steps_per_epoch": 2.5,
    "total_steps": 20,
}


def test_updates_are_those_of_sgd_written_out():
    optimizer = create_optimizer(**SETTINGS)
    params = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    state = optimizer.init(params)
    expected = {name: np.array(value, np.float64) for name, value in params.items()}
    trace = {name: 0.0 for name in params}
    rng = np.random.default_rng(0)
    for step in range(20):
        grads = {name: rng.normal(size=value.shape) for name, value in params.items()}
        updates, state = optimizer.update(
            {name: jnp.asarray(grad, jnp.float32) for name, grad in grads.items()}, state, params
        )
        params = optax.apply_updates(params, updates)
        # 5 steps of linear warm-up, then a cosine over the other 15.
        rate = 0.1 * (step / 5 if step < 5 else (1 + np.cos(np.pi * (step - 5) / 15)) / 2)
        for name, grad in grads.items():
            decay = 0.01 if name == "kernel" else 0.0
            grad = grad + decay * expected[name]
            trace[name] = 0.9 * trace[name] + grad
            expected[name] = expected[name] - rate * (grad + 0.9 * trace[name])
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "weight_decay", "warmup_epochs"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), "0.1"])
def test_bad_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* must be a number >= 0"):
        create_optimizer(**SETTINGS | {name: value})
