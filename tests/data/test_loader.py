import itertools

import jax
import numpy as np
import pytest

from slimconv_jax.data.loader import eval_batches, train_batches
from slimconv_jax.data.sources import Source
from slimconv_jax.training.step import batch_sharded, data_mesh

SHARDING = batch_sharded(data_mesh())


@pytest.fixture(scope="module")
def source():
    """37 images, each filled with its own index, which is its label too."""
    index = np.arange(37)
    images = np.broadcast_to(index[:, None, None, None], (37, 2, 2, 3)).astype(np.uint8)
    return Source(images, index.astype(np.int32), tuple(map(str, index)))


def labels_of_steps(source, first_step, steps, seed=0, batch_size=8):
    batches = train_batches(source, batch_size, seed=seed, sharding=SHARDING, first_step=first_step)
    labels = []
    for batch in itertools.islice(batches, steps):
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
        labels += batch["label"].tolist()
    return labels


def test_every_epoch_has_every_example_once_in_a_new_order(source):
    labels = labels_of_steps(source, first_step=0, steps=37)  # 8 epochs
    epochs = [labels[start : start + 37] for start in range(0, 8 * 37, 37)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_the_order_depends_on_the_seed_and_the_step_alone(source):
    labels = labels_of_steps(source, first_step=0, steps=12)
    assert labels_of_steps(source, first_step=7, steps=5) == labels[7 * 8 :]
    assert labels_of_steps(source, first_step=0, steps=12, seed=1) != labels


def test_a_batch_is_split_over_the_devices(source):
    batch = next(train_batches(source, 8, seed=0, sharding=SHARDING, first_step=0))
    assert len(batch["image"].sharding.device_set) == len(jax.devices()) == 8
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(1, 2, 2, 3)}
    assert batch["image"].dtype == np.uint8


@pytest.mark.parametrize("batch_size", [1, 8, 13, 37, 100])
def test_evaluation_has_every_example_once_in_batches_of_one_shape(source, batch_size):
    seen, shapes = [], set()
    for batch in eval_batches(source, batch_size, sharding=SHARDING):
        seen += np.asarray(batch["label"])[np.asarray(batch["mask"])].tolist()
        shapes.add(batch["image"].shape)
    assert seen == list(range(37))
    assert len(shapes) == 1
