"""Turns a source into batches on the devices, streamed from the host by Grain or kept there."""

import collections
import functools
import itertools
import math
import os
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from slimconv_jax.console import Progress
from slimconv_jax.data.sources import Source
from slimconv_jax.data.transforms import ImageError, Transform
from slimconv_jax.errors import InputError, require_integer

Batch = dict[str, jax.Array]

RESIDENT_BYTES = 2**30
"""The most bytes of uint8 that a data set may have to be kept on the devices by default."""

BATCHES_AHEAD = 2
"""Streamed batches that are on the devices ahead of time."""

CHUNK = 64
"""The most images that a thread decodes at a time; the memory for decoded images grows with it."""

ENDLESS = 2**40
"""More steps than any training run has."""


def load_dataset(
    source: Source,
    transform: Transform,
    training: bool,
    sharding: NamedSharding,
    *,
    on_device: bool | None = None,
    on_error: str = "raise",
    num_threads: int | None = None,
    repeats: int = 1,
) -> "ResidentDataset | StreamedDataset":
    """Loads a source as batches; the keyword-only arguments are the keys of `config.loader`.

    Args:
      source: from `load_source`.
      transform: how images come to one size.
      training: whether images get the transform's random crop or its central one.
      sharding: how the first axis of a batch lies on the devices.
      on_device: whether all images are decoded once and kept on the devices, which needs a
        transform without randomness. If None, they are where they take up to `RESIDENT_BYTES`.
      on_error: for images that cannot be decoded: "raise", or "skip", which leaves them out;
        then `skipped` names them.
      num_threads: threads that decode; None for one per core.
      repeats: how often an image is in a batch of training, each time with other crops and
        augmentations (Hoffer et al., CVPR 2020). An epoch has as many steps as without, and so goes
        through that part of the images only.

    Raises:
      ValueError: if an option is wrong, or an image cannot be decoded or has another size.
    """
    if on_device not in (None, True, False):
        raise InputError(f"loader: on_device={on_device!r} must be True, False or None")
    if on_error not in ("raise", "skip"):
        raise InputError(f"loader: on_error={on_error!r} must be 'raise' or 'skip'")
    if num_threads is not None:
        require_integer("loader: num_threads", num_threads, 1, 1024)
    require_integer("loader: repeats", repeats, 1, 1024)
    deterministic = not (training and transform.is_random)
    if on_device and not deterministic:
        raise InputError(
            "loader: on_device=True needs images that stay as they are, and config.transform has "
            f"random crops of {transform.image_size} pixels, which are made on the host"
        )
    if not len(source):
        raise InputError("the data set has no images")
    streamed = StreamedDataset(
        source,
        transform,
        on_error=on_error,
        sharding=sharding,
        num_threads=num_threads or os.cpu_count(),
        repeats=repeats,
    )
    fits = len(source) * math.prod(streamed.image_shape) <= RESIDENT_BYTES
    if on_device or (on_device is None and deterministic and fits):
        return ResidentDataset(streamed, sharding)
    return streamed


def image_shape(source: Source, transform: Transform, on_error: str) -> tuple[int, int, int]:
    """Returns the shape of every image: height and width in pixels, 3."""
    if size := transform.image_size:
        return size, size, 3
    for index in range(len(source)):
        try:
            return transform.for_evaluation(source[index].image, source.describe(index)).shape
        except ImageError as error:
            _refuse(error, on_error)
    raise _none_readable(source)


def _refuse(error: ImageError, on_error: str) -> None:
    """Raises an error about an image, with a hint, unless such images are skipped."""
    if on_error == "raise":
        raise ImageError(
            f"{error} (on_error=skip, --on-error skip, leaves such images out)"
        ) from None


def _none_readable(source: Source) -> InputError:
    return InputError(f"no image of the data set can be decoded, from {source.describe(0)} on")


def _aligned_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Returns zeros, uint8, aligned to 64 bytes, so that JAX on a CPU uses them without a copy."""
    size = math.prod(shape)
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(shape)


class StreamedDataset:
    """Images that Grain's threads decode on the host as they are needed.

    Of each batch, a process decodes only the rows of its own devices.

    Attributes:
      image_shape: (H, W, 3).
      repeats: how often an image is in a batch of training.
      skipped: descriptions of the examples that this process could not decode so far.
    """

    where = "streamed from the host"

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        on_error: str,
        sharding: NamedSharding,
        num_threads: int,
        repeats: int = 1,
    ):
        self._source = source
        self._transform = transform
        self._on_error = on_error
        self._sharding = sharding
        self._num_threads = num_threads
        self.repeats = repeats
        self.image_shape = image_shape(source, transform, on_error)
        self.skipped: set[str] = set()

    def __len__(self) -> int:
        return len(self._source)

    def train_batches(self, batch_size: int, *, seed: int, first_step: int) -> Iterator[Batch]:
        """Yields endless batches of `image` (B, H, W, 3) uint8 and `label` (B,) int32.

        Each epoch goes once through all examples in an order of its own; a batch may end one
        epoch and begin the next. The batch of a step, with its random crops, depends on the
        seed and the step alone: not on threads, processes or devices. So the step is all that
        has to be saved for a run to continue at `first_step` as if nothing had happened.
        """
        order = grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()
        if self.repeats > 1:
            order = _Repeated(order, batch_size, self.repeats)
        batches = self._on_devices(order, batch_size, ENDLESS, first_step=first_step, seed=seed)
        for batch in batches:
            del batch["mask"]
            yield batch

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields every example once, in order, with `mask` (B,) bool, False where there is none.

        All batches have one shape: `batch_size`, or the number of examples if there are fewer,
        rounded up to a multiple of the devices.
        """
        batch_size = round_up(min(batch_size, len(self)), self._sharding.mesh.size)
        order = grain.MapDataset.range(round_up(len(self), batch_size))
        return self._on_devices(order, batch_size, len(order) // batch_size)

    def decode(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns all images that can be decoded, (N, H, W, 3) uint8, and their labels, (N,) int32.

        Raises:
          ValueError: if none can.
        """
        images = np.empty((len(self), *self.image_shape), np.uint8)
        labels = np.empty(len(self), np.int32)
        count = 0
        order = grain.MapDataset.range(round_up(len(self), CHUNK))
        # Threads only get in each other's way where an image takes a fraction of a millisecond.
        tiny = math.prod(self.image_shape) < 64 * 64 * 3
        threads = 0 if tiny else self._num_threads
        chunks = self._on_host(order, CHUNK, range(CHUNK), len(order) // CHUNK, threads=threads)
        with Progress("decoding", len(self)) as progress:
            for chunk in chunks:
                kept = chunk["mask"]
                end = count + kept.sum()
                images[count:end], labels[count:end] = chunk["image"][kept], chunk["label"][kept]
                count = end
                progress.advance(min(CHUNK, len(self) - progress.done))
        if not count:
            raise _none_readable(self._source)
        return images[:count], labels[:count]

    def _on_devices(
        self, order: grain.MapDataset, batch_size: int, steps: int, **options
    ) -> Iterator[Batch]:
        """Yields global batches; sends a few to the devices ahead of time."""
        rows = _local_rows(self._sharding, batch_size)
        threads = self._num_threads
        ahead = collections.deque()
        for batch in self._on_host(order, batch_size, rows, steps, threads=threads, **options):
            ahead.append(
                {
                    key: jax.make_array_from_process_local_data(
                        self._sharding, value, (batch_size, *value.shape[1:])
                    )
                    for key, value in batch.items()
                }
            )
            if len(ahead) > BATCHES_AHEAD:
                yield ahead.popleft()
        yield from ahead

    def _on_host(
        self,
        order: grain.MapDataset,
        batch_size: int,
        rows: range,
        steps: int,
        *,
        threads: int,
        first_step: int = 0,
        seed: int | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields some rows of each batch of an order, decoded by threads that run ahead."""
        size = max(size for size in range(1, CHUNK + 1) if len(rows) % size == 0)
        parts = len(rows) // size

        def chunk(number: int) -> dict[str, np.ndarray]:
            step, part = divmod(number, parts)
            start = (first_step + step) * batch_size + rows.start + part * size
            return self._decode_chunk(order, range(start, start + size), seed)

        options = grain.ReadOptions(threads, prefetch_buffer_size=2 * threads)
        chunks = iter(grain.MapDataset.range(steps * parts).map(chunk).to_iter_dataset(options))
        for _ in range(steps):
            batch = list(itertools.islice(chunks, parts))
            batch = {
                key: batch[0][key] if parts == 1 else np.concatenate([c[key] for c in batch])
                for key in batch[0]
            }
            for index in batch.pop("skipped"):
                if index >= 0:
                    self.skipped.add(self._source.describe(int(index)))
            yield batch

    def _decode_chunk(
        self, order: grain.MapDataset, positions: range, seed: int | None
    ) -> dict[str, np.ndarray]:
        """Decodes the examples at some positions of an order, counted through all epochs.

        They are decoded straight into the arrays of the chunk: batching them one by one would
        copy the images once more. `mask` says where there is one; `skipped` has the index of one
        that cannot be decoded, else -1. An index beyond the last example is none. `seed` is
        that of the random crops in training, None for evaluation.
        """
        size = len(positions)
        chunk = {
            "image": _aligned_zeros((size, *self.image_shape)),
            "label": np.zeros(size, np.int32),
            "mask": np.zeros(size, bool),
            "skipped": np.full(size, -1),
        }
        for row, position in enumerate(positions):
            index = int(order[position])
            if index >= len(self):
                continue
            candidates = [index]
            if seed is not None:  # the next one that can be decoded takes its place
                candidates = itertools.chain(range(index, len(self)), range(index))
            for candidate in candidates:
                try:
                    example = self._decode(candidate, position, seed)
                except ImageError as error:
                    _refuse(error, self._on_error)
                    chunk["skipped"][row] = index
                else:
                    chunk["image"][row], chunk["label"][row] = example
                    chunk["mask"][row] = True
                    break
            if seed is not None and not chunk["mask"][row]:
                raise _none_readable(self._source)
        return chunk

    def _decode(self, index: int, position: int, seed: int | None) -> tuple[np.ndarray, int]:
        example, name = self._source[index], self._source.describe(index)
        if seed is None:
            image = self._transform.for_evaluation(example.image, name)
        else:
            rng = np.random.Generator(np.random.Philox(key=[seed, position]))
            image = self._transform.for_training(example.image, name, rng)
        if image.shape != self.image_shape:
            height, width, _ = self.image_shape
            raise InputError(
                f"the images differ in size, so they need an image_size to be brought to: {name} "
                f"has {image.shape[1]}x{image.shape[0]} pixels, others {width}x{height}"
            )
        return image, example.label


def _different(batch_size: int, repeats: int) -> int:
    """Returns the number of different images in a batch."""
    return -(-batch_size // repeats)


def _repeated_rows(batch_size: int, repeats: int) -> np.ndarray:
    """Returns which of the different images of a batch is in each of its rows.

    They are there in turn, then again in turn, from two further on: an image is not beside itself,
    since neighbours are mixed, nor always in the same part of a batch. Where `repeats` does not
    divide the batch, the last ones are there once less.
    """
    rows, different = np.arange(batch_size), _different(batch_size, repeats)
    return (rows + 2 * (rows // different)) % different


class _Repeated:
    """An order of examples in which each is several times in a batch."""

    def __init__(self, order: grain.MapDataset, batch_size: int, repeats: int):
        self._order, self._rows = order, _repeated_rows(batch_size, repeats)
        self._different = _different(batch_size, repeats)

    def __getitem__(self, position: int) -> int:
        step, row = divmod(position, len(self._rows))
        return self._order[step * self._different + int(self._rows[row])]


def round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple that is not less than a number."""
    return -(-number // multiple) * multiple


def _local_rows(sharding: NamedSharding, batch_size: int) -> range:
    """Returns the rows of a batch that belong to this process; they are consecutive."""
    rows = [
        rows.indices(batch_size)[:2]
        for (rows,) in sharding.addressable_devices_indices_map((batch_size,)).values()
    ]
    return range(min(start for start, _ in rows), max(stop for _, stop in rows))


class ResidentDataset:
    """Images decoded once and kept on every device, where batches are put together, too.

    Its order is drawn on the devices and is another than that of a `StreamedDataset`.

    Args:
      streamed: where the images come from.
      sharding: how the first axis of a batch lies on the devices.

    Attributes:
      image_shape: (H, W, 3).
      skipped: descriptions of the examples that could not be decoded.
    """

    where = "kept on the devices"

    def __init__(self, streamed: StreamedDataset, sharding: NamedSharding):
        self.image_shape, self._repeats = streamed.image_shape, streamed.repeats
        images, labels = streamed.decode()
        self.skipped = streamed.skipped
        self._size = len(images)
        self._sharding = sharding
        self._everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        self._data = {
            key: jax.make_array_from_process_local_data(self._everywhere, value, value.shape)
            for key, value in (("image", images), ("label", labels))
        }

    def __len__(self) -> int:
        return self._size

    def train_batches(self, batch_size: int, *, seed: int, first_step: int) -> Iterator[Batch]:
        """Yields the batches of a `StreamedDataset`, without work for the host.

        `batch_size` must not exceed the number of images.
        """
        key = jax.random.key(seed)
        orders = {}  # of this epoch and the next, where a batch may end
        different = _different(batch_size, self._repeats)
        for step in itertools.count(first_step):
            epoch, start = divmod(step * different, self._size)
            orders.pop(epoch - 1, None)
            for wanted in (epoch, epoch + 1):
                if wanted not in orders:
                    orders[wanted] = _shuffled(
                        key, wanted, size=self._size, sharding=self._everywhere
                    )
            batch = _take(
                self._data,
                tuple(orders.values()),
                start,
                size=batch_size,
                repeats=self._repeats,
                sharding=self._sharding,
            )
            del batch["mask"]
            yield batch

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields the batches of a `StreamedDataset`, without work for the host."""
        batch_size = round_up(min(batch_size, self._size), self._sharding.mesh.size)
        order = np.arange(round_up(self._size, batch_size), dtype=np.int32)
        order = jax.make_array_from_process_local_data(self._everywhere, order, order.shape)
        for start in range(0, self._size, batch_size):
            yield _take(self._data, (order,), start, size=batch_size, sharding=self._sharding)


@functools.partial(jax.jit, static_argnames=("size", "sharding"))
def _shuffled(key: jax.Array, epoch: int, *, size: int, sharding: NamedSharding) -> jax.Array:
    """Returns the order of an epoch."""
    order = jax.random.permutation(jax.random.fold_in(key, epoch), size)
    return jax.lax.with_sharding_constraint(order, sharding)


@functools.partial(jax.jit, static_argnames=("size", "repeats", "sharding"))
def _take(
    data: Batch,
    orders: tuple[jax.Array, ...],
    start: int,
    *,
    size: int,
    repeats: int = 1,
    sharding: NamedSharding,
) -> Batch:
    """Takes `size` examples from `start` on, in one order after the other.

    `mask` is False where there is none.
    """
    count = _different(size, repeats)
    indices = jax.lax.dynamic_slice(jnp.concatenate(orders), (start,), (count,))
    if repeats > 1:
        indices = indices[_repeated_rows(size, repeats)]
    batch = {key: array.at[indices].get(mode="clip") for key, array in data.items()}
    batch["mask"] = indices < len(data["label"])
    return jax.lax.with_sharding_constraint(batch, sharding)
