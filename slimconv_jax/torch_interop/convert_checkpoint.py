"""Converts a checkpoint file of PyTorch to a saved model, and compares it with PyTorch."""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from slimconv_jax.console import console, say
from slimconv_jax.data.image_files import find_images
from slimconv_jax.data.preprocessing import normalize
from slimconv_jax.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MOST_SIDE,
    read_image,
    resize_and_crop,
)
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.files import checksum, read_text
from slimconv_jax.models.complexity import count_params
from slimconv_jax.models.slimconv import CompressionRatio
from slimconv_jax.models.zoo import describe, name_of, nearest_name
from slimconv_jax.storage.model_directory import check_destination, save_model
from slimconv_jax.torch_interop import import_torch
from slimconv_jax.torch_interop.checkpoint_file import read_checkpoint
from slimconv_jax.torch_interop.convert import clean_state_dict, from_torch, rename
from slimconv_jax.torch_interop.file_formats import checkpoint_files
from slimconv_jax.torch_interop.parity import DEFAULT_TOLERANCE, Parity, check_parity


def convert_checkpoint(
    checkpoint: os.PathLike | str,
    output: os.PathLike | str,
    *,
    overwrite: bool = False,
    format: str = "orbax",
    arch: str | os.PathLike | None = None,
    k: CompressionRatio | None = None,
    gating: str | None = None,
    key: str | None = None,
    renames: Sequence[tuple[str, str]] = (),
    class_names: os.PathLike | str | None = None,
    parity: bool = True,
    images: os.PathLike | str | None = None,
    num_images: int = 8,
    image_size: int | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
) -> None:
    """Writes the model of a checkpoint file to a directory that `load_model` opens.

    It prints what it reads, converts, compares and writes.

    Args:
      checkpoint: a file of `torch.save`, .safetensors, .npz, .pkl or .msgpack; of a model in
        several files the index or one of them.
      output: the new directory.
      overwrite: whether to replace a model that is there already.
      format: of the weights; see `save_model`.
      arch: see `from_torch`.
      k: see `from_torch`.
      gating: see `from_torch`.
      key: where in the file the state dict is, keys joined by dots; None to search for it.
      renames: see `rename`.
      class_names: a file with the name of each class, one a line.
      parity: whether to compare with the published network in PyTorch.
      images: a directory of images to compare on; None for random numbers.
      num_images: how many images to compare on.
      image_size: pixels a side; None for 224, or 32 with the small stem.
      tolerance: the error that is allowed in float32, relative to the largest value of each
        output; beyond it, a ten thousandth of it in float64 decides.

    Raises:
      ValueError: if an argument or the file cannot be used, or the model does not compute the same;
        then nothing is written.
    """
    check_destination(output, overwrite=overwrite)
    require_integer("--num-images", num_images, 1, 10**4)
    if image_size is not None:
        require_integer("--image-size", image_size, 1, MOST_SIDE)
    if not 0 <= tolerance < math.inf:
        raise InputError(f"--tolerance={tolerance} must be a number >= 0")
    names = class_names and read_class_names(class_names)
    if parity:
        import_torch()
    times: dict[str, float] = {}

    with timed(times, "reading"):
        entries, place, places = read_checkpoint(checkpoint, key=key)
        digests = {file.name: checksum(file) for file in checkpoint_files(checkpoint)}
        state_dict = clean_state_dict(rename(entries, renames))
    where = f" under {place!r}" if place else ""
    others = ", ".join(repr(other) for other in places if other != place)
    there = f"; {others} not used, see --key" if others else ""
    say(f"read    {checkpoint}: {len(state_dict)} tensors{where}{there}")
    for name, digest in digests.items():
        say(f"        SHA-256 {digest}{f'  {name}' if len(digests) > 1 else ''}")

    with timed(times, "converting"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = from_torch(state_dict, arch=arch, k=k, gating=gating)
    say(f"model   {describe(model.config)}: {count_params(model):,} parameters")
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    if name_of(model.config) is None and model.config.channels is None:
        print(
            "warning: this package has no architecture with these blocks; if the file is "
            f"incomplete, --arch lists what is missing (--arch {nearest_name(model.config)}?)",
            file=sys.stderr,
        )

    num_classes = model.config.num_classes
    if names and len(names) != num_classes:
        raise InputError(
            f"{class_names} names {len(names)} classes, and the model has {num_classes}"
        )

    (name, digest), *more = digests.items()
    if more:
        name, digest = Path(checkpoint).name, digests
    info = {"source": {"file": name, "sha256": digest, "state_dict": place}, "parity": None}
    if names:
        info["class_names"] = names
    if parity:
        with timed(times, "comparing"):
            size = image_size or (224 if model.config.stem == "imagenet" else 32)
            try:
                inputs, kind = create_inputs(images, num_images, size)
                say(f"parity  with the published network in PyTorch, on {kind}, in float32:")
                result = check_parity(model, state_dict, inputs)
                show(result, num_classes)
                if difference := result.first_difference(tolerance):
                    # Saturated gates, for one, can amplify rounding a hundredfold.
                    say(f"        {difference.stage} is beyond {tolerance:.0e}; again, in float64:")
                    tolerance *= 1e-4
                    with jax.enable_x64(True):
                        result = check_parity(model, state_dict, inputs.astype(np.float64))
                    show(result, num_classes)
            except (MemoryError, RuntimeError) as error:  # of JAX and PyTorch, when memory ends
                raise InputError(
                    "the comparison failed; fewer or smaller images may help (--num-images, "
                    f"--image-size): {str(error).strip().splitlines()[0]}"
                ) from None
        if difference := result.first_difference(tolerance):
            finite = "" if difference.same_finite else " and in which values are finite"
            raise InputError(
                f"the model is not the published PyTorch network: {difference.stage} differs "
                f"first, by {difference.max_rel_error:.1e} of its largest value{finite} "
                f"(allowed in float64: {tolerance:.1e}); nothing was written"
            )
        if unknown := next((s.stage for s in result.stages if s.finite < 1), None):
            print(
                f"warning: from {unknown} on, values are infinite or NaN, in PyTorch as well; "
                "only finite ones were compared",
                file=sys.stderr,
            )
        info["parity"] = {"inputs": kind, "tolerance": tolerance, **dataclasses.asdict(result)}

    with timed(times, "writing"), uninterrupted():
        save_model(model, output, format=format, overwrite=overwrite, info=info)
    split = ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.items())
    say(f"wrote   {output} in {sum(times.values()):.1f} s ({split})")
    say(f'        model = slimconv_jax.load_model("{output}")')


def create_inputs(
    directory: os.PathLike | str | None, count: int, size: int
) -> tuple[np.ndarray, str]:
    """Returns images (N, size, size, 3), float32 and normalised, and what they are in words."""
    if directory is None:
        noise = np.random.default_rng(0).normal(size=(count, size, size, 3))
        return noise.astype(np.float32), f"{count} images of {size}x{size} random numbers"
    files = find_images(directory)
    files = [files[i] for i in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)]
    pixels = np.stack([resize_and_crop(read_image(file), size) for file in files])
    images = np.array(normalize(pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD))
    return images, f"{len(files)} images of {size}x{size} from {directory}"


def show(parity: Parity, num_classes: int) -> None:
    """Prints the errors of each stage; without classes, the last is of the pooled features."""
    row = "        {:8} {:>12}  {:>13}  {:>17}"
    say(row.format("output", "shape", "max abs error", "max relative error"))
    for stage in parity.stages:
        shape = "x".join(map(str, stage.shape))
        errors = (stage.max_abs_error, stage.max_rel_error)
        texts = (f"{error:.1e}" if stage.finite else "not finite" for error in errors)
        name = "pooled" if stage.stage == "logits" and not num_classes else stage.stage
        say(row.format(name, shape, *texts))
    if num_classes:
        same = round(parity.top1_agreement * parity.images)
        say(f"        the same class comes first in {same} of {parity.images} images")


def read_class_names(path: os.PathLike | str) -> list[str]:
    """Reads the lines of a file, which must be different names."""
    try:
        names = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the class names in {path}: {error}") from None
    seen = set()
    for number, name in enumerate(names, start=1):
        if not name or name in seen:
            what = f"{name!r} a second time" if name else "no name"
            raise InputError(f"line {number} of {path} has {what}; each line must name a class")
        seen.add(name)
    return names


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores Ctrl-C for the second or two of writing, while Orbax runs threads."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Records the seconds that the block takes, and shows a spinner on a terminal."""
    start = time.perf_counter()
    with console.status(f"{name} ..."):
        yield
    times[name] = time.perf_counter() - start
