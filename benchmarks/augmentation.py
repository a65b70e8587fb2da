"""What the augmentations inside the training step cost on this device.

    python benchmarks/augmentation.py [--batch-size N] [--image-size N]

Milliseconds an image, medians of repeats that take turns, each with random numbers of its own. What
they cost on TPUs and GPUs that are not here says `slimconv plan` with and without them.
"""

import argparse
import functools
import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from scripts import run_script

from slimconv_jax.benchmark.measure import repeated, take_turns
from slimconv_jax.training.augment import augment

POLICIES = {
    "flip": {"flip": True},
    "crop of 4 pixels": {"crop_padding": 4},
    "random erasing, 1/4": {"erase_probability": 0.25},
    "mixup or CutMix": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
    "TrivialAugment": {"trivialaugment_wide": True},
    "RandAugment, 1 layer": {"randaugment_layers": 1},
    "RandAugment, 2 layers": {"randaugment_layers": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--image-size", type=int, default=224, metavar="N")
    parser.add_argument("--repeats", type=int, default=15, metavar="N")
    args = parser.parse_args()
    shape = (args.batch_size, args.image_size, args.image_size, 3)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    targets = jax.nn.one_hot(jnp.arange(args.batch_size) % 10, 10)
    rounds = []
    for options in POLICIES.values():
        program = jax.jit(functools.partial(augment, **options))
        seeds = itertools.count()

        def run(program=program, seeds=seeds):
            return program(jax.random.key(next(seeds)), images, targets)

        rounds.append(repeated(run))
    seconds = take_turns(rounds, repeats=args.repeats)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.batch_size} images at once, "
        f"{args.image_size}x{args.image_size} pixels, medians of {args.repeats}"
    )
    for name, times in zip(POLICIES, seconds, strict=True):
        print(f"{name:22} {1000 * statistics.median(times) / args.batch_size:8.3f} ms an image")


if __name__ == "__main__":
    run_script(main)
