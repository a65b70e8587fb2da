"""Parameters that stay, and learning rates of their own."""

import jax
import numpy as np
import optax
import pytest
import torch
from plain_step import build, make_batch
from randomize import randomized

from slimconv_jax.models.variables import variables
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.training.fine_tuning import check_patterns, names_of, rate_factors
from slimconv_jax.training.optimizer import create_optimizer

OPTIONS = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
}
IN_PYTORCH = {
    "sgd": lambda groups: torch.optim.SGD(
        groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "adamw": lambda groups: torch.optim.AdamW(
        groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    ),
}


def small(name="sc_resnet26"):
    return abstract_model(name, width=8, num_classes=3, stem="cifar")


def params_like_a_resnet():
    rng = np.random.default_rng(0)

    def kernel():
        return {"kernel": rng.normal(size=(3, 4)).astype(np.float32)}

    stages = {0: {0: kernel()}, 1: {0: kernel(), 1: kernel()}}
    return {"stem": kernel(), "stages": stages, "classifier": kernel()}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("settings", "factors"),  # of classifier, stages.0.0, 1.0, 1.1, and the stem
    [
        ({"layer_decay": 0.5}, (1, 1 / 8, 1 / 4, 1 / 2, 1 / 16)),  # timm's, of five layers
        ({"learning_rate_factors": ("classifier*=10", "stem.*=0")}, (10, 1, 1, 1, 0)),
        (
            {"learning_rate_factors": ("stages.1.*=3", "*.1.kernel=2"), "layer_decay": 0.5},
            (1, 1 / 8, 3 / 4, 6 / 2, 1 / 16),
        ),
    ],
)
def test_rates_are_those_of_parameter_groups_in_pytorch(name, settings, factors):
    params = params_like_a_resnet()
    leaves, tree = jax.tree.flatten(params)
    tensors = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in leaves]
    rate = 0.1
    theirs = IN_PYTORCH[name](
        [{"params": [t], "lr": rate * f} for t, f in zip(tensors, factors, strict=True)]
    )
    ours = create_optimizer(
        lambda step: rate, name=name, weight_decay=0.1, **OPTIONS[name], **settings
    )
    state = ours.init(params)
    rng = np.random.default_rng(1)
    for _ in range(5):
        grads = [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(grad)
        theirs.step()
        updates, state = ours.update(jax.tree.unflatten(tree, grads), state, params)
        params = optax.apply_updates(params, updates)
    for leaf, tensor in zip(jax.tree.leaves(params), tensors, strict=True):
        np.testing.assert_allclose(leaf, tensor.detach(), rtol=1e-5, atol=1e-6)


def test_layers_of_a_network():
    names = names_of(params := variables(small())["params"])
    factors = dict(
        zip(
            jax.tree.leaves(names),
            jax.tree.leaves(rate_factors(params, (), layer_decay=0.5)),
            strict=True,
        )
    )
    assert factors["classifier.bias"] == 1
    assert factors["stages.3.1.conv3.bn.scale"] == 0.5
    assert factors["stages.3.0.shortcut.conv.kernel"] == 0.25
    assert factors["stages.0.0.conv2.gate.excite.bias"] == 0.5**8
    assert factors["stem.conv.kernel"] == 0.5**9


@pytest.mark.parametrize(
    ("name", "options", "moments"),
    [("sgd", {"momentum": 0.9}, 1), pytest.param("lamb", {}, 2, marks=pytest.mark.long)],
)
def test_frozen_parameters_stay_to_the_bit(name, options, moments):
    model = randomized(lambda: small("sc_resnet14"))
    model.stem.conv.kernel[...] = model.stem.conv.kernel[...].at[0, 0, 0, 0].set(-0.0)
    freeze = ("stem.*", "stages.[01].*")
    optimizer = create_optimizer(
        lambda step: 0.1,
        name=name,
        weight_decay=0.1,
        weight_decay_on="all",
        freeze=freeze,
        **options,
    )
    step, state = build(model, optimizer, freeze=freeze)
    before, batch = jax.tree.map(np.asarray, state.params), make_batch()
    for _ in range(2):
        state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])

    names = jax.tree.leaves(names_of(before))
    changed = set()
    for path, old, new in zip(*map(jax.tree.leaves, (names, before, state.params)), strict=True):
        if np.asarray(old).tobytes() != np.asarray(new).tobytes():
            changed.add(path)
    assert changed == {n for n in names if not n.startswith(("stem.", "stages.0.", "stages.1."))}
    kept = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert kept < 0.99 * moments * sum(leaf.size for leaf in jax.tree.leaves(before))


@pytest.mark.long
def test_the_gradient_of_what_stays_is_not_computed():
    model = randomized(lambda: small("resnet26"))

    def convolutions(freeze):
        optimizer = create_optimizer(lambda step: 0.1, freeze=freeze)
        step, state = build(model, optimizer, batch_norm="frozen", freeze=freeze)
        text = step.func.lower(*step.args, state, make_batch()).as_text()
        return text.count("stablehlo.convolution")

    forward = convolutions(("stem*", "stages*"))  # a linear probe
    assert convolutions(()) > 2.5 * forward


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"freeze": ("stages.0*", "stages.9*")},
            r"freeze: 'stages.9\*' matches no parameter \(did you mean 'stages.3\*'\?\)",
        ),
        (
            {"learning_rate_factors": ("clasifier*=10",)},
            r"learning_rate_factors: 'clasifier\*' matches no .*did you mean 'classifier\*'",
        ),
        ({"freeze": ("*",)}, "leaves no parameter to train"),
    ],
)
def test_patterns_that_match_nothing(settings, message):
    params = variables(small())["params"]
    check_patterns(params, freeze=("stem.*",), learning_rate_factors=("stages.*=0.1",))
    with pytest.raises(ValueError, match=message):
        check_patterns(params, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": "stem*"}, r"freeze='stem\*' must be a list of patterns"),
        ({"freeze": (1,)}, r"freeze=\(1,\) must be a list of patterns"),
        ({"learning_rate_factors": ("stem",)}, "'stem'; it must be PATTERN=FACTOR"),
        ({"learning_rate_factors": ("stem*=-1",)}, "with a factor from 0 on"),
        ({"layer_decay": 1.5}, "layer_decay=1.5 must be a number from 0 to 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(lambda step: 0.1, **settings)
