"""From a source to batches on the devices."""

import itertools
from collections.abc import Iterator

import grain
import jax
import numpy as np

from slimconv_jax.data.sources import Source

Batch = dict[str, jax.Array]


def train_batches(
    source: Source, batch_size: int, *, seed: int, sharding: jax.sharding.Sharding, first_step: int
) -> Iterator[Batch]:
    """Endless batches of `image` (B, H, W, 3) uint8 and `label` (B,) int32.

    Each epoch goes once through all examples in an order of its own; a batch may end one
    epoch and begin the next. The batch of a step depends on the seed and the step alone,
    so a run that continues at `first_step` sees what an uninterrupted one would.
    """
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(batch_size)
    for step in itertools.count(first_step):
        indices = order[step]
        batch = {"image": source.images[indices], "label": source.labels[indices]}
        yield jax.device_put(batch, sharding)


def eval_batches(
    source: Source, batch_size: int, *, sharding: jax.sharding.NamedSharding
) -> Iterator[Batch]:
    """Every example once, in order, with `mask` (B,) bool, False where a batch is filled up.

    All batches have one shape: `batch_size`, rounded up to a multiple of the devices.
    """
    devices = sharding.mesh.size
    batch_size = -(-batch_size // devices) * devices
    for start in range(0, len(source), batch_size):
        indices = np.arange(start, start + batch_size)
        mask = indices < len(source)
        indices = np.where(mask, indices, 0)
        batch = {"image": source.images[indices], "label": source.labels[indices], "mask": mask}
        yield jax.device_put(batch, sharding)
