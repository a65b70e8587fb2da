import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slimconv_jax.training.optimizer import (
    arguments_of,
    averaged_params,
    create_optimizer,
    create_schedule,
    is_schedule_free,
)

RUN = {"batch_size": 64, "steps_per_epoch": 2.5, "total_steps": 20}


def rates(**settings):
    schedule = create_schedule(**RUN | settings)
    return np.array([float(schedule(step)) for step in range(20)])


def cosine(steps):
    return (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2


def test_cosine_after_a_warmup():
    # 2 epochs are 5 steps of linear warm-up; the other 15 are the cosine.
    expected = np.concatenate([np.arange(5) / 5, cosine(15)])
    np.testing.assert_allclose(rates(learning_rate=0.3, warmup_epochs=2), 0.3 * expected, rtol=1e-5)
    np.testing.assert_allclose(rates(learning_rate=0.3), 0.3 * cosine(20), rtol=1e-5)


def test_steps_down_at_milestones_that_count_from_the_beginning():
    settings = {"schedule": "multistep", "milestones": (4, 6), "decay_factor": 0.2}
    expected = np.repeat([1, 0.2, 0.04], [10, 5, 5])  # epochs of 2.5 steps
    np.testing.assert_allclose(rates(learning_rate=1.0, **settings), expected, rtol=1e-6)
    near = rates(learning_rate=1.0, **settings | {"milestones": (4, 4.1)})  # the same step
    np.testing.assert_allclose(near, np.repeat([1, 0.04], 10), rtol=1e-6)
    expected = expected * np.minimum(np.arange(20) / 5, 1)
    warm = rates(learning_rate=1.0, warmup_epochs=2, **settings)
    np.testing.assert_allclose(warm, expected, rtol=1e-6)


def test_a_constant_rate_scaled_with_the_batch():
    settings = {"learning_rate": 0.1, "schedule": "constant"}
    np.testing.assert_allclose(rates(**settings), 0.1)
    np.testing.assert_allclose(rates(**settings, base_batch_size=256), 0.025)
    np.testing.assert_allclose(rates(**settings, base_batch_size=32), 0.2)


def sgd(p, g, rate, decay, memory, step):
    g = g + decay * p
    memory["trace"] = 0.8 * memory.get("trace", 0) + g
    return p - rate * (g + 0.8 * memory["trace"])


def adam(g, memory, step, eps):
    memory["m"] = 0.7 * memory.get("m", 0) + 0.3 * g
    memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * g**2
    m, v = memory["m"] / (1 - 0.7 ** (step + 1)), memory["v"] / (1 - 0.95 ** (step + 1))
    return m / (np.sqrt(v) + eps)


def adamw(p, g, rate, decay, memory, step):
    return p - rate * (adam(g, memory, step, 1e-3) + decay * p)


def lamb(p, g, rate, decay, memory, step):
    update = adam(g, memory, step, 1e-3) + decay * p
    return p - rate * np.linalg.norm(p) / np.linalg.norm(update) * update


def lars(p, g, rate, decay, memory, step):
    update = g + decay * p
    if p.ndim > 1:
        update = 0.01 * np.linalg.norm(p) / (np.linalg.norm(update) + 1e-3) * update
    memory["trace"] = 0.8 * memory.get("trace", 0) + rate * update
    return p - memory["trace"]


ADAM = {"b1": 0.7, "b2": 0.95, "eps": 1e-3}
CASES = {
    "sgd": (sgd, {"momentum": 0.8, "nesterov": True}),
    "adamw": (adamw, ADAM),
    "lamb": (lamb, ADAM),
    "lars": (lars, {"momentum": 0.8, "eps": 1e-3, "trust_coefficient": 0.01}),
}


@pytest.mark.parametrize(
    ("name", "weight_decay_on"),
    # With "all", LARS adapts the rate of all parameters, and this reference only that of kernels.
    [("sgd", "all"), ("adamw", "all"), ("lamb", "all"), *((name, "kernels") for name in CASES)],
)
def test_updates_are_those_of_the_papers_written_out(name, weight_decay_on):
    reference, options = CASES[name]
    schedule = create_schedule(learning_rate=0.1, warmup_epochs=2, **RUN)
    optimizer = create_optimizer(
        schedule, name=name, weight_decay=0.02, weight_decay_on=weight_decay_on, **options
    )
    params = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    state = optimizer.init(params)
    expected = {key: np.array(value, np.float64) for key, value in params.items()}
    memory = {key: {} for key in params}
    rng = np.random.default_rng(0)
    for step in range(20):
        grads = {key: rng.normal(size=value.shape) for key, value in params.items()}
        updates, state = optimizer.update(
            {key: jnp.asarray(grad, jnp.float32) for key, grad in grads.items()}, state, params
        )
        params = optax.apply_updates(params, updates)
        for key, grad in grads.items():
            decay = 0.02 if key == "kernel" or weight_decay_on == "all" else 0.0
            rate = float(schedule(step))
            expected[key] = reference(expected[key], grad, rate, decay, memory[key], step)
    for key in params:
        np.testing.assert_allclose(params[key], expected[key], rtol=2e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam", {"mu_dtype": "bfloat16"}),
        ("adafactor", {"min_dim_size_to_factor": 8}),
        ("lion", {"b1": 0.95}),
        ("muon", {"ns_steps": 4, "nesterov": False}),
        ("radam", {}),
        ("schedule_free_adamw", {"b1": 0.95, "weight_decay_on": "all"}),
        ("schedule_free_sgd", {"weight_decay_on": "all"}),
    ],
)
def test_any_optimiser_of_optax_finds_a_minimum(name, options):
    optimizer = create_optimizer(
        lambda step: 0.1, name=name, weight_decay=1e-3, clip_norm=10.0, **options
    )
    target = np.random.default_rng(0).normal(size=(3, 3, 4, 8)).astype(np.float32)
    params = {"kernel": jnp.ones_like(target), "bias": jnp.ones(8)}

    def loss(params):
        return jnp.square(params["kernel"] - target).sum() + jnp.square(params["bias"] - 2).sum()

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    first = loss(params)
    for _ in range(150):
        params, state = step(params, state)
    if is_schedule_free(name):
        params = averaged_params(state, params)
    assert loss(params) < 0.2 * first


def test_the_arguments_of_an_optimiser_are_read_off_its_signature():
    kinds = {key: parameter.annotation for key, parameter in arguments_of("muon").items()}
    assert kinds["ns_steps"] is int and kinds["beta"] is float and kinds["nesterov"] is bool
    assert kinds["mu_dtype"] is str
    assert not kinds.keys() & {"learning_rate", "weight_decay", "weight_decay_mask", "mask"}
    assert "muon_weight_dimension_numbers" not in kinds
    assert arguments_of("nobody") == arguments_of(3) == {}


def test_muon_takes_convolutions_as_matrices():
    optimizer = create_optimizer(lambda step: 1.0, name="muon", ns_steps=8, nesterov=False)
    params = {"kernel": jnp.zeros((3, 3, 4, 8))}
    grads = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 8)))}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    values = np.linalg.svd(np.reshape(updates["kernel"], (36, 8)), compute_uv=False)
    assert values.max() / values.min() < 2  # Adam's would be all signs: a ratio of 3 and more


def test_averaged_parameters_are_those_of_optax():
    params = {"a": jnp.arange(3.0), "b": jnp.ones(2)}
    grads = {"a": jnp.ones(3), "b": jnp.arange(2.0)}
    theirs = optax.contrib.schedule_free_sgd(0.1, b1=0.8)
    ours = create_optimizer(lambda step: 0.1, name="schedule_free_sgd", b1=0.8, freeze=("b",))
    both = []
    for optimizer in (theirs, ours):
        state, y = optimizer.init(params), params
        for _ in range(3):
            updates, state = optimizer.update(grads, state, y)
            y = optax.apply_updates(y, updates)
        both.append((state, y))
    expected = optax.contrib.schedule_free_eval_params(*both[0])
    average = averaged_params(*both[1])
    np.testing.assert_allclose(average["a"], expected["a"], rtol=1e-5)
    np.testing.assert_array_equal(average["b"], params["b"])


def test_a_long_gradient_is_shortened_before_weight_decay():
    schedule = create_schedule(learning_rate=1.0, schedule="constant", **RUN)
    optimizer = create_optimizer(schedule, momentum=0.0, weight_decay=0.5, clip_norm=1.0)
    params = {"kernel": jnp.array([[2.0, 0.0]])}
    for gradient, clipped in (([[3.0, 4.0]], [[0.6, 0.8]]), ([[0.3, 0.4]], [[0.3, 0.4]])):
        state = optimizer.init(params)
        updates, _ = optimizer.update({"kernel": jnp.array(gradient)}, state, params)
        np.testing.assert_allclose(updates["kernel"], -np.array(clipped) - [[1, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -0.1}, "learning_rate=-0.1 must be a number >= 0"),
        ({"learning_rate": "0.1"}, "learning_rate='0.1' must be a number >= 0"),
        ({"warmup_epochs": float("nan")}, "warmup_epochs=nan must be a number"),
        ({"warmup_epochs": 1e308}, r"warmup_epochs=1e\+308 must be a number >= 0 and < 1e\+06"),
        ({"warmup_epochs": 11}, "warmup_epochs=11 is longer than the run, of 8 epochs;"),
        ({"learning_rate": 1e308}, r"learning_rate=1e\+308 must be a number >= 0 and < 1e\+06"),
        ({"decay_factor": -1}, "decay_factor=-1 must be"),
        ({"base_batch_size": 0}, "base_batch_size=0 must be"),
        ({"schedule": "linear"}, "'linear' must be one of 'constant', 'cosine', 'multistep'"),
        ({"schedule": "multistep"}, "needs some"),
        ({"milestones": (3,)}, r"milestones=\(3,\) with schedule='cosine'"),
        ({"schedule": "multistep", "milestones": (6, 3)}, "milestone=3 must be a number >= 6"),
        ({"schedule": "multistep", "milestones": "3"}, "milestones='3' must be a list"),
    ],
)
def test_bad_schedules(settings, message):
    with pytest.raises(ValueError, match=message):
        rates(**{"learning_rate": 0.1} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamm"}, "name='adamm' must be one of 'acprop', .*'adam', .*'sgd', "),
        ({"name": "dpsgd"}, "Optax cannot build dpsgd: .* missing 3 required .*'l2_norm_clip', "),
        (
            {"name": "novograd", "weight_decay": 0.1},
            "novograd decays all parameters or none; set w",
        ),
        ({"weight_decay": -1}, "weight_decay=-1 must be a number >= 0"),
        ({"weight_decay_on": "biases"}, "'biases' must be one of 'kernels', 'all'"),
        ({"clip_norm": -1}, "clip_norm=-1 must be"),
        ({"clip_norm": 0}, "clip_norm=0 must be a number >= 1e-12"),
        ({"momentum": 1.0}, "momentum=1.0 must be a number >= 0 and < 1"),
        ({"nesterov": 1}, "nesterov=1 must be True or False"),
        ({"b1": 0.5}, "sgd has no b1; it has momentum, nesterov"),
        ({"name": "adamw", "momentum": 0.9}, "adamw has no momentum; it has b1, b2, eps"),
        ({"name": "lamb", "eps": float("inf")}, "eps=inf must be a number"),
        (
            {"name": "schedule_free_sgd", "learning_rate_factors": ("x=2",)},
            "learning_rate_factors and layer_decay are not for schedule_free_sgd",
        ),
        (
            {"name": "schedule_free_sgd", "layer_decay": 0.5},
            "learning_rate_factors and layer_decay are not for schedule_free_sgd",
        ),
    ],
)
def test_bad_optimizers(settings, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(lambda step: 0.1, **settings)
