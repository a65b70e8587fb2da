import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from image_files import encode, smooth, write_folder, write_tfds

from slimconv_jax.data.datasets import load_source
from slimconv_jax.data.loader import ResidentDataset, StreamedDataset, load_dataset
from slimconv_jax.data.sources import ArraySource, ImageFolder
from slimconv_jax.data.transforms import Transform
from slimconv_jax.devices import batch_sharded, data_mesh

SHARDING = batch_sharded(data_mesh())
BOTH = pytest.mark.parametrize("on_device", [True, False])


def numbered(size):
    """Images filled with their own index, which is their label too."""
    index = np.arange(size)
    images = np.broadcast_to(index[:, None, None, None], (size, 2, 2, 3)).astype(np.uint8)
    return ArraySource(images, index, tuple(map(str, index)), "numbers")


def load(source, transform=Transform(), training=True, **options):  # noqa: B008
    return load_dataset(source, transform, training=training, sharding=SHARDING, **options)


def labels_of_steps(dataset, first_step, steps, seed=0, batch_size=8):
    batches = dataset.train_batches(batch_size, seed=seed, first_step=first_step)
    labels = []
    for batch in itertools.islice(batches, steps):
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
        labels += batch["label"].tolist()
    return labels


@BOTH
def test_every_epoch_has_every_example_once_in_a_new_order(on_device):
    dataset = load(numbered(37), on_device=on_device)
    labels = labels_of_steps(dataset, first_step=0, steps=37)  # 8 epochs
    epochs = [labels[start : start + 37] for start in range(0, 8 * 37, 37)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8


@BOTH
def test_the_order_depends_on_the_seed_and_the_step_alone(on_device):
    dataset = load(numbered(37), on_device=on_device)
    labels = labels_of_steps(dataset, first_step=0, steps=12)
    assert labels_of_steps(dataset, first_step=7, steps=5) == labels[7 * 8 :]
    assert labels_of_steps(dataset, first_step=0, steps=12, seed=2**32 - 1) != labels


@BOTH
@pytest.mark.parametrize(("size", "repeats"), [(16, 2), (24, 3), (40, 6)])
def test_repeated_images_share_a_batch_but_not_a_neighbourhood(on_device, size, repeats):
    dataset = load(numbered(56), on_device=on_device, repeats=repeats)
    labels = labels_of_steps(dataset, first_step=0, steps=16, batch_size=size)
    count = -(-size // repeats)  # 40 rows are six times 7 images, but for two of the last
    batches = [labels[start : start + size] for start in range(0, 16 * size, size)]
    different = [batch[:count] for batch in batches]
    for batch, once in zip(batches, different, strict=True):
        assert len(set(once)) == count and set(batch) == set(once)
        assert {batch.count(label) for label in once} <= {repeats, repeats - (size % repeats > 0)}
        around = [] if size % repeats else batch[:1]  # mixes wrap around
        assert all(a != b for a, b in itertools.pairwise(batch + around))
        for label in once:  # in another part of the batch each time, for RandAugment's operations
            rows = [row for row in range(size) if batch[row] == label]
            assert len({row % count for row in rows}) == len(rows)
    # In the same order as without, one after the other.
    plain = load(numbered(56), on_device=on_device)
    assert list(itertools.chain(*different)) == labels_of_steps(plain, 0, 2 * count)
    assert labels_of_steps(dataset, first_step=9, steps=7, batch_size=size) == labels[9 * size :]


@BOTH
def test_a_batch_is_split_over_the_devices(on_device):
    batch = next(load(numbered(37), on_device=on_device).train_batches(8, seed=0, first_step=0))
    assert batch.keys() == {"image", "label"}
    assert len(batch["image"].sharding.device_set) == len(jax.devices()) == 8
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(1, 2, 2, 3)}
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32


def test_repeated_images_are_cropped_apart():
    images = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
    source = ArraySource(images, np.arange(8), tuple(map(str, range(8))), "noise")
    dataset = load(source, Transform(image_size=16), repeats=2)
    batch = next(dataset.train_batches(16, seed=0, first_step=0))
    of_label = {}
    for image, label in zip(np.asarray(batch["image"]), batch["label"].tolist(), strict=True):
        of_label.setdefault(label, []).append(image)
    assert len(of_label) == 8 and all((a != b).any() for a, b in of_label.values())


@BOTH
@pytest.mark.parametrize("batch_size", [1, 8, 13, 37, 100])
def test_evaluation_has_every_example_once_in_batches_of_one_shape(on_device, batch_size):
    seen, shapes = [], set()
    for batch in load(numbered(37), on_device=on_device).eval_batches(batch_size):
        mask = np.asarray(batch["mask"])
        seen += np.asarray(batch["label"])[mask].tolist()
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0][mask], batch["label"][mask])
        shapes.add((batch["image"].shape, batch["label"].shape, batch["mask"].shape))
    assert seen == list(range(37))
    assert len(shapes) == 1


def test_what_fits_stays_on_the_devices(monkeypatch):
    assert isinstance(load(numbered(37)), ResidentDataset)
    assert isinstance(load(numbered(37), on_device=False), StreamedDataset)
    assert isinstance(load(numbered(37), Transform(2)), StreamedDataset)  # random crops
    assert isinstance(load(numbered(37), Transform(2), training=False), ResidentDataset)
    monkeypatch.setattr("slimconv_jax.data.loader.RESIDENT_BYTES", 37 * 2 * 2 * 3 - 1)
    assert isinstance(load(numbered(37)), StreamedDataset)
    assert isinstance(load(numbered(37), on_device=True), ResidentDataset)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fifteen images of many sizes, among them two that are none."""
    root = tmp_path_factory.mktemp("folder")
    files = {f"{i % 3}/{i:02}.jpg": encode(smooth(40 + i, 60), "JPEG") for i in range(15)}
    write_folder(root, "good", files)
    cut = files["1/07.jpg"]
    return write_folder(root, "bad", files | {"0/03.jpg": b"no", "1/07.jpg": cut[:-100]})


def test_random_crops_do_not_depend_on_threads_and_chunks(folder, monkeypatch):
    batches = []
    for num_threads, chunk in ((1, 64), (3, 64), (2, 3)):
        monkeypatch.setattr("slimconv_jax.data.loader.CHUNK", chunk)
        dataset = load(ImageFolder(folder, "good"), Transform(16), num_threads=num_threads)
        steps = dataset.train_batches(8, seed=5, first_step=0)
        batches.append([jax.device_get(batch) for batch in itertools.islice(steps, 5)])
    for first, *others in zip(*batches, strict=True):
        assert first["image"].shape == (8, 16, 16, 3)
        for other in others:
            np.testing.assert_array_equal(first["image"], other["image"])
            np.testing.assert_array_equal(first["label"], other["label"])
    # A run that continues gets the same crops; every epoch has new ones.
    steps = load(ImageFolder(folder, "good"), Transform(16)).train_batches(8, seed=5, first_step=3)
    np.testing.assert_array_equal(next(steps)["image"], batches[0][3]["image"])
    crops = {image.tobytes() for batch in batches[0] for image in batch["image"]}
    assert len(crops) == 40


def test_evaluation_of_a_folder_is_the_transform_of_each_file(folder):
    source, transform = ImageFolder(folder, "good"), Transform(16)
    for on_device in (True, False):
        dataset = load(source, transform, training=False, on_device=on_device)
        (batch,) = dataset.eval_batches(16)
        for index in range(15):
            image = transform.for_evaluation(source[index].image, "")
            np.testing.assert_array_equal(batch["image"][index], image)
            assert batch["label"][index] == source[index].label


def test_images_that_cannot_be_decoded_are_an_error_that_names_them(folder):
    source = ImageFolder(folder, "bad")
    message = r"^cannot read the image .*(0/03|1/07)\.jpg: (it is in none of|image file is trunc)"
    for training, on_device in ((True, None), (False, True), (False, False)):
        with pytest.raises(ValueError, match=message):
            dataset = load(source, Transform(16), training=training, on_device=on_device)
            if training:
                list(itertools.islice(dataset.train_batches(8, seed=0, first_step=0), 2))
            else:
                list(dataset.eval_batches(8))


@BOTH
def test_or_they_are_left_out_of_an_evaluation_and_named(folder, on_device):
    source = ImageFolder(folder, "bad")
    options = {"training": False, "on_error": "skip", "on_device": on_device}
    dataset = load(source, Transform(16), **options)
    seen = []
    for batch in dataset.eval_batches(8):
        seen += np.asarray(batch["label"])[np.asarray(batch["mask"])].tolist()
    assert seen == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    bad = [str(folder / "bad" / name) for name in ("0/03.jpg", "1/07.jpg")]
    assert sorted(dataset.skipped) == bad


def test_or_left_out_of_training_where_the_next_takes_their_place(folder):
    dataset = load(ImageFolder(folder, "bad"), Transform(16), on_error="skip")
    good = load(ImageFolder(folder, "good"), Transform(16))
    batches = [d.train_batches(8, seed=0, first_step=0) for d in (dataset, good)]
    different = 0
    for _ in range(15):  # eight epochs
        ours, theirs = (jax.device_get(next(b)) for b in batches)
        different += (ours["image"] != theirs["image"]).any(axis=(1, 2, 3)).sum()
    assert different == 2 * 8
    bad = [str(folder / "bad" / name) for name in ("0/03.jpg", "1/07.jpg")]
    assert sorted(dataset.skipped) == bad


def test_images_of_different_sizes_need_a_transform(folder):
    message = (
        r"^the images differ in size, so they need .*: .*/0/03\.jpg has 60x43 pixels, others 60x40"
    )
    for on_device in (True, False):
        with pytest.raises(ValueError, match=message):
            dataset = load(ImageFolder(folder, "good"), num_threads=1, on_device=on_device)
            list(dataset.eval_batches(8))


def test_where_no_image_can_be_decoded(tmp_path):
    write_folder(tmp_path, "val", {"a/1.png": b"", "a/2.png": b""})
    source = ImageFolder(tmp_path, "val")
    for transform, training in ((Transform(), True), (Transform(4), False)):
        with pytest.raises(ValueError, match=r"^no image of the data set can be decoded"):
            load(source, transform, training=training, on_error="skip")
    dataset = load(source, Transform(4), on_error="skip")
    with pytest.raises(ValueError, match=r"^no image .* decoded, from .*/a/1\.png on"):
        next(dataset.train_batches(8, seed=0, first_step=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_device": 1.5}, "^loader: on_device=1.5 must be True, False or None$"),
        ({"on_error": "ignore"}, "^loader: on_error='ignore' must be 'raise' or 'skip'$"),
        ({"num_threads": 0}, "^loader: num_threads=0 must be an integer >= 1$"),
        ({"repeats": 0}, "loader: repeats=0 must be an integer >= 1"),
        ({"on_device": True, "transform": Transform(8)}, "has random crops of 8 pixels"),
        ({"source": numbered(0)}, "^the data set has no images$"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        load(**{"source": numbered(3), **options})


PROCESS = """
import itertools, json, sys
import jax
import numpy as np
address, count, index, root, data, on_device = sys.argv[1:]
if int(count) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(index))
from slimconv_jax.data.loader import load_dataset
from slimconv_jax.data.datasets import load_source
from slimconv_jax.data.transforms import Transform
from slimconv_jax.devices import batch_sharded, data_mesh

class Identified:
    '''A data set whose label is the index of the record, and its image what was read.'''
    def __init__(self, source):
        self.source, self.class_names = source, tuple(map(str, range(len(source))))
        self.read = []
    def __len__(self):
        return len(self.source)
    def __getitem__(self, index):
        self.read.append(index)
        return self.source[index]._replace(label=index)
    def describe(self, index):
        return self.source.describe(index)

source = Identified(load_source(data, "train", data_dir=root))
dataset = load_dataset(
    source, Transform(8 if on_device == "False" else None), training=True,
    sharding=batch_sharded(data_mesh()), on_device=on_device == "True", num_threads=1,
)
source.read.clear()
steps = []
for batch in itertools.islice(dataset.train_batches(8, seed=3, first_step=0), 15):
    shards = [(s.index[0].start, s.data) for s in batch["label"].addressable_shards]
    rows = {start: np.asarray(data).tolist() for start, data in shards}
    image = {s.index[0].start: int(np.asarray(s.data).astype(int).sum())
             for s in batch["image"].addressable_shards}
    steps.append([[start, rows[start], image[start]] for start in sorted(rows)])
evaluation = [
    [np.asarray(s.data)[np.asarray(m.data)].tolist() for s, m in
     zip(batch["label"].addressable_shards, batch["mask"].addressable_shards)]
    for batch in dataset.eval_batches(8)
]
print(json.dumps({"steps": steps, "read": source.read, "eval": evaluation}))
"""


def in_processes(count, root, data, on_device):
    """What each of several processes with 4 / count devices saw of the training batches."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={4 // count}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, *map(str, (count, i, root, data, on_device))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for i in range(count)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.process
@BOTH
def test_two_processes_see_every_example_once_an_epoch_and_what_one_would(tmp_path, on_device):
    images = [(encode(smooth(12, 12, seed=i)), i % 3) for i in range(40)]
    write_tfds(tmp_path, {"train": images})
    two = in_processes(2, tmp_path, "tfds/animals", on_device)
    (one,) = in_processes(1, tmp_path, "tfds/animals", on_device)
    for process in two:  # each has only its own rows, half of each batch
        assert all(len(step) == 2 for step in process["steps"])
    together = [a + b for a, b in zip(*(process["steps"] for process in two), strict=True)]
    assert together == one["steps"]  # labels and pixels, at the same places of the batch
    ids = [label for step in together for _, labels, _ in step for label in labels]
    for epoch in range(3):
        assert sorted(ids[40 * epoch :][:40]) == list(range(40))
    assert ids[:40] != ids[40:80]
    if not on_device:  # and each has read only its share, and a little ahead
        assert all(len(process["read"]) < 40 + 60 + 40 for process in two)
    evaluated = [labels for process in two for batch in process["eval"] for labels in batch]
    assert sorted(itertools.chain(*evaluated)) == list(range(40))


@pytest.mark.skipif(
    not os.environ.get("SLIMCONV_TEST_DATA"), reason="SLIMCONV_TEST_DATA is not set"
)
def test_cifar100_is_kept_on_the_devices_as_its_records_say():
    source = load_source("tfds/cifar100", "test[:2000]", data_dir=os.environ["SLIMCONV_TEST_DATA"])
    dataset = load(source, training=False)
    assert isinstance(dataset, ResidentDataset) and dataset.image_shape == (32, 32, 3)
    batch = next(dataset.eval_batches(2000))
    assert batch["mask"].all()
    for index in (0, 999, 1999):
        image, label = source[index]
        np.testing.assert_array_equal(batch["image"][index], Transform().for_evaluation(image, ""))
        assert batch["label"][index] == label
