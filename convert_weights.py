"""Imports the weights of a PyTorch checkpoint, and checks that the model computes the same.

    python convert_weights.py CHECKPOINT OUTPUT

OUTPUT becomes a directory that slimconv_jax.load_model opens. The architecture is read off the
shapes. What leaves no trace in them is taken to be as published: strides, dilation, activations,
anti-aliasing, the epsilon of batch norm. The model is compared with the published network in
PyTorch, with the weights of the file, on the same images; if they differ, nothing is written. It is
not compared with the network of the file's author, which the file does not hold.
"""

import argparse
import contextlib
import dataclasses
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from slimconv_jax.console import console, exit_status, prepare_console, say
from slimconv_jax.data.image_files import find_images
from slimconv_jax.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MOST_SIDE,
    read_image,
    resize_and_crop,
)
from slimconv_jax.devices import enable_compilation_cache, find_devices
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.files import checksum, read_text
from slimconv_jax.models.complexity import count_params
from slimconv_jax.models.zoo import describe, name_of, nearest_name
from slimconv_jax.saving import FORMATS, check_destination, save_model
from slimconv_jax.torch_interop import import_torch
from slimconv_jax.torch_interop.checkpoint_file import read_checkpoint
from slimconv_jax.torch_interop.convert import clean_state_dict, from_torch, rename
from slimconv_jax.torch_interop.file_formats import checkpoint_files
from slimconv_jax.torch_interop.parity import DEFAULT_TOLERANCE, Parity, check_parity
from slimconv_jax.training.augment import normalize


def convert(args: argparse.Namespace) -> None:
    """Converts as the command line says."""
    check_destination(args.output, overwrite=args.overwrite)
    require_integer("--num-images", args.num_images, 1, 10**4)
    if args.image_size is not None:
        require_integer("--image-size", args.image_size, 1, MOST_SIDE)
    if not 0 <= args.tolerance < math.inf:
        raise InputError(f"--tolerance={args.tolerance} must be a number >= 0")
    class_names = args.class_names and read_class_names(args.class_names)
    times: dict[str, float] = {}

    with timed(times, "reading"):
        entries, place, places = read_checkpoint(args.checkpoint, key=args.key)
        digests = {file.name: checksum(file) for file in checkpoint_files(args.checkpoint)}
        state_dict = clean_state_dict(rename(entries, args.rename))
    where = f" under {place!r}" if place else ""
    others = [other for other in places if other != place]
    there = f"; {', '.join(map(repr, others))} left aside, see --key" if others else ""
    say(f"read    {args.checkpoint}: {len(state_dict)} tensors{where}{there}")
    for name, digest in digests.items():
        say(f"        SHA-256 {digest}{f'  {name}' if len(digests) > 1 else ''}")

    with timed(times, "converting"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = from_torch(state_dict, arch=args.arch, k=args.k)
    say(f"model   {describe(model.config)}: {count_params(model):,} parameters")
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    if name_of(model.config) is None and model.config.channels is None:
        print(
            "warning: this package has no architecture of these blocks; if the file is incomplete, "
            f"--arch lists what is missing (--arch {nearest_name(model.config)}?)",
            file=sys.stderr,
        )

    if class_names and len(class_names) != model.config.num_classes:
        raise InputError(
            f"{args.class_names} names {len(class_names)} classes, and the model has "
            f"{model.config.num_classes}"
        )

    name, digest = next(iter(digests.items()))
    if len(digests) > 1:
        name, digest = Path(args.checkpoint).name, digests
    source = {"file": name, "sha256": digest, "state_dict": place}
    info = {"source": source, "parity": None}
    if class_names:
        info["class_names"] = class_names
    if args.parity:
        with timed(times, "comparing"):
            tolerance = args.tolerance
            size = args.image_size or (224 if model.config.stem == "imagenet" else 32)
            try:
                images, kind = inputs(args.images, args.num_images, size)
                say(f"parity  with the published network in PyTorch, on {kind}, in float32:")
                parity = check_parity(model, state_dict, images)
                show(parity, model.config.num_classes)
                if difference := parity.first_difference(tolerance):
                    # Saturated gates, for one, can amplify rounding a hundredfold.
                    say(f"        {difference.stage} is beyond {tolerance:.0e}; again, in float64:")
                    tolerance *= 1e-4
                    with jax.enable_x64(True):
                        parity = check_parity(model, state_dict, images.astype(np.float64))
                    show(parity, model.config.num_classes)
            except (MemoryError, RuntimeError) as error:  # of JAX and PyTorch, when memory ends
                raise InputError(
                    f"the comparison failed, which fewer or smaller images may mend (--num-images, "
                    f"--image-size): {str(error).strip().splitlines()[0]}"
                ) from None
        if difference := parity.first_difference(tolerance):
            raise InputError(
                "the model is not the published PyTorch network: "
                f"{difference.stage} differs first, by {difference.max_rel_error:.1e} of its "
                "largest value"
                + ("" if difference.same_finite else " and in which values are finite")
                + f" (allowed in float64: {tolerance:.1e}); nothing was written"
            )
        if unknown := next((s.stage for s in parity.stages if s.finite < 1), None):
            print(
                f"warning: from {unknown} on, values are infinite or NaN, in PyTorch as well; "
                "only finite ones were compared",
                file=sys.stderr,
            )
        info["parity"] = {
            "inputs": kind,
            "tolerance": tolerance,
            **dataclasses.asdict(parity),
        }

    with timed(times, "writing"), uninterrupted():
        save_model(model, args.output, format=args.format, overwrite=args.overwrite, info=info)
    split = ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.items())
    say(f"wrote   {args.output} in {sum(times.values()):.1f} s ({split})")
    say(f'        model = slimconv_jax.load_model("{args.output}")')


def inputs(directory: str | None, count: int, size: int) -> tuple[np.ndarray, str]:
    """Images (N, size, size, 3), float32 and normalised, and what they are in words."""
    if directory is None:
        noise = np.random.default_rng(0).normal(size=(count, size, size, 3))
        return noise.astype(np.float32), f"{count} images of {size}x{size} random numbers"
    files = find_images(directory)
    files = [files[i] for i in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)]
    pixels = np.stack([resize_and_crop(read_image(file), size) for file in files])
    images = np.array(normalize(pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD))
    return images, f"{len(files)} images of {size}x{size} from {directory}"


def show(parity: Parity, num_classes: int) -> None:
    """Prints the errors, stage by stage; without classes the last ones are of pooled features."""
    row = "        {:8} {:>12}  {:>13}  {:>17}"
    say(row.format("output", "shape", "max abs error", "max relative error"))
    for stage in parity.stages:
        shape = "x".join(map(str, stage.shape))
        errors = (
            f"{error:.1e}" if stage.finite else "not finite"
            for error in (stage.max_abs_error, stage.max_rel_error)
        )
        name = "pooled" if stage.stage == "logits" and not num_classes else stage.stage
        say(row.format(name, shape, *errors))
    if not num_classes:
        return
    same = round(parity.top1_agreement * parity.images)
    say(f"        the same class comes first in {same} of {parity.images} images")


def read_class_names(path: str) -> list[str]:
    """The lines of a file; each must be another name."""
    try:
        names = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the class names in {path}: {error}") from None
    seen = set()
    for number, name in enumerate(names, start=1):
        if not name or name in seen:
            what = f"{name!r} a second time" if name else "no name"
            raise InputError(f"line {number} of {path} has {what}; a class name a line is needed")
        seen.add(name)
    return names


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores Ctrl-C for the second or two of writing, in which Orbax has threads of its own."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Notes the seconds that something takes, and shows a spinner meanwhile on a terminal."""
    start = time.perf_counter()
    with console.status(f"{name} ..."):
        yield
    times[name] = time.perf_counter() - start


def parse_rename(text: str) -> tuple[str, str]:
    """Splits REGEX=REPLACEMENT at the last equals sign."""
    pattern, equals, replacement = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form REGEX=REPLACEMENT")
    return pattern, replacement


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a file of torch.save, .safetensors, "
        ".npz, .pkl or .msgpack; of a model in several files the index or one of them",
    )
    add("output", metavar="OUTPUT", help="the new directory")
    add("--overwrite", action="store_true", help="replace a model that is at OUTPUT already")
    add("--format", choices=FORMATS, default="orbax", help="of the weights (default: orbax)")
    add(
        "--arch",
        metavar="NAME",
        help="fail unless this is the architecture, at any k; or a JSON file of channels, needed "
        "for a network of irregular widths",
    )
    add("--k", metavar="K", help="fail unless this is the compression ratio, such as 8/3")
    add("--key", help="where in the file the state dict is, if it is not found: keys, with dots")
    add(
        "--rename",
        action="append",
        default=[],
        type=parse_rename,
        metavar="REGEX=REPLACEMENT",
        help="change the names of entries, prefixes included, as re.sub does; an entry whose "
        "name becomes empty is left out; can be repeated",
    )
    add(
        "--class-names",
        metavar="FILE",
        help="the name of each class, one a line, for model.json (for ImageNet the sorted WordNet "
        "IDs, n01440764 and so on); evaluate matches them with those of the data",
    )
    parity = parser.add_argument_group("comparison with PyTorch")
    add = parity.add_argument
    add("--no-parity", dest="parity", action="store_false", help="leave it out")
    add("--images", metavar="DIR", help="compare on images from here, not on random numbers")
    add("--num-images", type=int, default=8, metavar="N", help="how many (default: 8)")
    add("--image-size", type=int, metavar="N", help="pixels a side (default: 224; small stem: 32)")
    add(
        "--tolerance",
        type=float,
        default=DEFAULT_TOLERANCE,
        metavar="X",
        help="allowed error in float32, relative to the largest value of each output; beyond it, a "
        "ten thousandth of it in float64 decides (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    prepare_console()
    return exit_status(lambda: _run(argv), interrupted="interrupted; nothing was written")


def _run(argv: list[str] | None) -> None:
    args = parse_args(argv)
    enable_compilation_cache()
    find_devices()
    if args.parity:
        import_torch()
    convert(args)


if __name__ == "__main__":
    sys.exit(main())
