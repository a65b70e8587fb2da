import jax
import numpy as np
import pytest
from flax import nnx
from randomize import apply, randomized

from slimconv_jax.data.loader import eval_batches
from slimconv_jax.data.sources import Source
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.training.evaluate import make_evaluate
from slimconv_jax.training.step import TrainState, batch_sharded, data_mesh


@pytest.fixture(scope="module")
def model():
    return randomized(lambda: abstract_model("resnet14", width=4, num_classes=3, stem="cifar"))


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (7, 8), (64, 8), (1000, 1)])
def test_totals_do_not_depend_on_batches_and_devices(model, batch_size, devices):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, 37).astype(np.int32)
    source = Source(images, labels, ("a", "b", "c"))

    mesh = data_mesh(jax.devices()[:devices])
    evaluate = make_evaluate(model, preprocess=lambda x: x / 255.0, mesh=mesh)
    params, batch_stats = (
        nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat)
    )
    state = TrainState(0, params, batch_stats, None)
    batches = eval_batches(source, batch_size, sharding=batch_sharded(mesh))
    totals = evaluate(state, batches)

    inference = nnx.clone(model)
    inference.eval()
    logits = np.asarray(apply(inference, images / np.float32(255)), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(37), labels]
    assert totals["examples"] == 37
    assert totals["correct"] == (logits.argmax(-1) == labels).sum()
    np.testing.assert_allclose(totals["loss"], losses.sum(), rtol=1e-5)
    # Building an evaluation does not switch the caller's model.
    assert model.stem.bn.use_running_average is False
