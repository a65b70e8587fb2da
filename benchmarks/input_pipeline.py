"""Training batches from JPEG files: how many images a second the host delivers, and against whom.

    python benchmarks/input_pipeline.py [--data-dir ROOT --split train] [--json FILE]

Each loader makes batches of 224x224 uint8 images by random resized crops, on the same cores and
from the same files, in turns:

  slimconv_jax    what train.py does: Grain's threads, simplejpeg, OpenCV
  pillow          what torchvision does: PyTorch's DataLoader with a process a core, Pillow's
                  decoder and antialiased filter, a uint8 tensor; where PyTorch is installed
  tf.data         where TensorFlow is installed: decode_and_crop_jpeg, bilinear resizing, a thread
                  a core

ROOT/SPLIT/CLASS/ holds photos. Without --data-dir, JPEGs are made of noise of ImageNet's usual size
(500x375 pixels, 100 kB). Every loader delivers some
batches before the clock starts. Figures are medians over the repeats.
"""

import argparse
import importlib.util
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scripts import run_script

from slimconv_jax.data.loader import load_dataset
from slimconv_jax.data.sources import ImageFolder
from slimconv_jax.data.transforms import Transform, sample_crop
from slimconv_jax.devices import batch_sharded, data_mesh
from slimconv_jax.errors import require_integer

SIZE = 224
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def ours(files: list[str], root: Path, split: str, args: argparse.Namespace) -> Iterator[object]:
    """Batches on the device, as a training run gets them."""
    dataset = load_dataset(
        Repeated(ImageFolder(root, split), args.images),
        Transform(SIZE, SCALE, RATIO),
        training=True,
        sharding=batch_sharded(data_mesh()),
        num_threads=args.cores,
    )
    return dataset.train_batches(args.batch_size, seed=0, first_step=0)


class Repeated:
    """A source as if it had more images: Grain's shuffle of a very small one is slow."""

    def __init__(self, source: ImageFolder, size: int):
        self._source, self._size, self.class_names = source, size, source.class_names

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int):
        return self._source[index % len(self._source)]

    def describe(self, index: int) -> str:
        return self._source.describe(index % len(self._source))


class PillowDataset:
    """torchvision's ImageFolder, RandomResizedCrop and PILToTensor, with the calls they make."""

    def __init__(self, files: list[str], size: int):
        self._files, self._size = files, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int):
        import torch

        with open(self._files[index % len(self._files)], "rb") as file:
            image = Image.open(file).convert("RGB")
        rng = np.random.default_rng(index)
        top, left, height, width = sample_crop(rng, image.height, image.width, SCALE, RATIO)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return torch.as_tensor(np.array(image, copy=True)).permute(2, 0, 1)


def pillow(files: list[str], root: Path, split: str, args: argparse.Namespace) -> Iterator[object]:
    """Batches in PyTorch's DataLoader, as torchvision's reference script makes them."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        PillowDataset(files, args.images),
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.cores,
        drop_last=True,
    )
    while True:
        yield from loader


def tf_data(files: list[str], root: Path, split: str, args: argparse.Namespace) -> Iterator[object]:
    """Batches of tf.data, as TensorFlow's ResNet recipes make them."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")

    def load(path, seed):
        data = tf.io.read_file(path)
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.zeros([1, 0, 4]),
            seed=tf.cast(seed, tf.int32),
            area_range=SCALE,
            aspect_ratio_range=RATIO,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, (SIZE, SIZE), method="bilinear")
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = args.cores
    paths = tf.data.Dataset.from_tensor_slices(files).repeat().shuffle(len(files), seed=0)
    seeds = tf.data.Dataset.random(seed=0).batch(2)
    dataset = tf.data.Dataset.zip((paths, seeds)).map(load, num_parallel_calls=args.cores)
    return iter(dataset.batch(args.batch_size).prefetch(2).with_options(options))


LOADERS = {"slimconv_jax": ours, "pillow": pillow, "tf.data": tf_data}


def images_per_second(
    batches: Iterator[object], batch_size: int, count: int, *, warm_up: int
) -> float:
    """The rate at which batches arrive, after some that lay ready or set everything going."""
    for _ in itertools.islice(batches, warm_up):
        pass
    start = time.perf_counter()
    for batch in itertools.islice(batches, count):
        assert 3 in np.shape(batch["image"] if isinstance(batch, dict) else batch)
    return count * batch_size / (time.perf_counter() - start)


def write_noise(root: Path, count: int) -> None:
    """JPEGs of the size and weight of ImageNet's, in one class."""
    directory = root / "train" / "noise"
    directory.mkdir(parents=True)
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 256, (150, 200, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        image.save(directory / f"{seed:03}.jpg", quality=85)


def stages(files: list[str], count: int = 200) -> dict[str, float]:
    """Milliseconds that one core takes for each part of an image, on average."""
    import simplejpeg

    from slimconv_jax.data import transforms

    data = [Path(path).read_bytes() for path in itertools.islice(itertools.cycle(files), count)]
    rng = np.random.default_rng(0)

    def average(function: Callable[[bytes], object]) -> float:
        start = time.perf_counter()
        for item in data:
            function(item)
        return 1000 * (time.perf_counter() - start) / count

    def crop(item: bytes):
        return transforms.random_resized_crop(item, "", rng, size=SIZE, scale=SCALE, ratio=RATIO)

    def pillow_decode(item: bytes):
        return Image.open(io.BytesIO(item)).convert("RGB")

    return {
        "whole JPEG decoded by simplejpeg": average(simplejpeg.decode_jpeg),
        "whole JPEG decoded by Pillow": average(pillow_decode),
        "crop decoded and resized by slimconv_jax": average(crop),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-dir", type=Path, metavar="ROOT", help="photos in ROOT/SPLIT/CLASS (default: noise)")
    add("--split", default="train", help="default: train")
    add("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    add("--batches", type=int, default=40, metavar="N", help="a repeat (default: 40)")
    add("--repeats", type=int, default=5, metavar="N", help="default: 5")
    add("--cores", type=int, default=os.cpu_count(), metavar="N", help="default: all")
    add("--images", type=int, default=20_000, metavar="N", help="length of an epoch (20000)")
    add("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    for name in ("batch_size", "batches", "repeats", "cores", "images"):
        require_integer(f"--{name.replace('_', '-')}", getattr(args, name), 1)

    loaders = dict(LOADERS)
    for name, package in (("pillow", "torch"), ("tf.data", "tensorflow")):
        if importlib.util.find_spec(package) is None:
            print(f"{name} is left out, since {package} is not installed")
            del loaders[name]
    with tempfile.TemporaryDirectory() as scratch:
        root, split = args.data_dir, args.split
        if root is None:
            root, split = Path(scratch), "train"
            write_noise(root, 100)
        source = ImageFolder(root, split)
        files = [source.describe(index) for index in range(len(source))]
        size = statistics.mean(os.path.getsize(path) for path in files)
        print(f"{len(files)} files of {size / 1000:.0f} kB on average, {args.cores} cores")
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for repeat in range(args.repeats):
            for name, make in loaders.items():
                # Anew each time, since a loader that runs ahead would take the others' cores.
                batches = make(files, root, split, args)
                rate = images_per_second(
                    batches, args.batch_size, args.batches, warm_up=4 * args.cores
                )
                del batches
                rates[name].append(rate)
                print(f"repeat {repeat + 1}: {name:12} {rate:7,.0f} images/s", flush=True)
        parts = stages(files)

    ours_median = statistics.median(rates["slimconv_jax"])
    print(f"\n{'loader':14}{'images/s':>10}{'lowest':>10}{'highest':>10}   slimconv_jax is")
    for name, values in rates.items():
        median = statistics.median(values)
        print(
            f"{name:14}{median:10,.0f}{min(values):10,.0f}{max(values):10,.0f}   "
            f"{ours_median / median:.2f} x"
        )
    print("\non one core:")
    for name, milliseconds in parts.items():
        print(f"  {name:42}{milliseconds:6.2f} ms")
    if args.json:
        report = {"images_per_second": rates, "milliseconds": parts, "cores": args.cores}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
