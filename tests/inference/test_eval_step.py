import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from randomize import apply, randomized

from slimconv_jax.data.loader import load_dataset
from slimconv_jax.data.sources import ArraySource
from slimconv_jax.data.transforms import Transform
from slimconv_jax.devices import batch_sharded, data_mesh
from slimconv_jax.inference.eval_step import make_evaluate, summarize
from slimconv_jax.models.variables import variables
from slimconv_jax.models.zoo import abstract_model


@pytest.fixture(scope="module")
def model():
    return randomized(lambda: abstract_model("resnet14", width=4, num_classes=9, stem="cifar"))


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (7, 8), (64, 8), (1000, 1)])
def test_totals_do_not_depend_on_batches_and_devices(model, batch_size, devices, on_device):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    labels = rng.integers(0, 9, 37).astype(np.int32)

    mesh = data_mesh(jax.devices()[:devices])
    dataset = load_dataset(
        ArraySource(images, labels, "abcdefghi", "noise"),
        Transform(),
        training=False,
        sharding=batch_sharded(mesh),
        on_device=on_device,
    )

    def squares(logits, targets):
        return ((logits - targets) ** 2).sum(-1)

    evaluate = make_evaluate(model, normalize=lambda x: x / 255.0, mesh=mesh, loss=squares)
    latencies = []
    totals = evaluate(variables(model), dataset.eval_batches(batch_size), latencies)
    rounded = -(-batch_size // devices) * devices
    assert len(latencies) == -(-37 // rounded) and min(latencies) > 0

    inference = nnx.clone(model)
    inference.eval()
    logits = np.asarray(apply(inference, images / np.float32(255)), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(37), labels]
    rank = (logits > logits[np.arange(37), labels][:, None]).sum(-1)
    assert totals["examples"] == 37
    assert totals["top1"] == (rank < 1).sum()
    assert totals["top5"] == (rank < 5).sum()
    assert 0 < totals["top1"] < totals["top5"] < 37
    np.testing.assert_allclose(totals["loss"], losses.sum(), rtol=1e-6)
    expected = ((logits - np.eye(9)[labels]) ** 2).sum()
    np.testing.assert_allclose(totals["training_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(summarize(totals)["training_loss"], expected / 37, rtol=1e-5)
    # Building an evaluation does not switch the caller's model.
    assert model.stem.bn.use_running_average is False


@pytest.mark.long
def test_a_sum_over_very_many_batches_keeps_its_digits():
    # Ten thousand batches of one image: in float32 alone, the sum of the losses would be off
    # in the fifth digit.
    model = abstract_model("resnet14", width=4, num_classes=9, stem="cifar")
    model = randomized(lambda: model)
    mesh = data_mesh(jax.devices()[:1])

    def normalize(images):
        return images / 255.0

    evaluate = make_evaluate(model, normalize=normalize, mesh=mesh)
    image = np.zeros((1, 8, 8, 3), np.uint8)
    batch = {"image": image, "label": np.zeros(1, np.int32), "mask": np.ones(1, bool)}
    batch = jax.device_put(batch, batch_sharded(mesh))
    (one, many) = (
        evaluate(variables(model), itertools.repeat(batch, times)) for times in (1, 10_000)
    )
    assert many["examples"] == 10_000
    np.testing.assert_allclose(float(many["loss"]), 10_000 * float(one["loss"]), rtol=2e-7)


def test_a_summary():
    totals = {"loss": 6.0, "top1": 1, "top5": 3, "examples": 4}
    assert summarize(totals) == {
        "loss": 1.5,
        "top1": 0.25,
        "top5": 0.75,
        "correct": 1,
        "correct_top5": 3,
        "examples": 4,
    }
