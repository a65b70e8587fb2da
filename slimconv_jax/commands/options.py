"""Options that several commands share: the saved model, and how its images are prepared."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimconv_jax.errors import InputError

if TYPE_CHECKING:
    from slimconv_jax.inference.saved import SavedModel

_OPENING = ("checkpoint", "ema", "average", "dtype", "image_size", "crop_ratio", "mean", "std")
"""The options that are arguments of `open_model`."""


def add_saved_model(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose a saved model and its weights."""
    parser.add_argument(
        "model",
        metavar="MODEL_OR_WORKDIR",
        help="a directory of save_model or `convert`, or the work directory of `train`",
    )
    add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose the weights of a training run."""
    add = parser.add_argument
    add(
        "--checkpoint",
        type=int,
        metavar="STEP",
        help="for a work directory, the checkpoint of this step (default: the newest)",
    )
    add(
        "--ema",
        action="store_true",
        help="for a work directory, the averaged weights (config.step.ema_decay)",
    )
    add(
        "--average",
        type=int,
        default=1,
        metavar="N",
        help="for a work directory, the mean of the weights of N checkpoints, this one and those "
        "before it",
    )


def add_inference(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say how images are read and prepared for a model."""
    add = parser.add_argument
    add("--batch-size", type=int, default=64, metavar="N", help="images per batch (default: 64)")
    add(
        "--image-size",
        type=size_or_none,
        default=argparse.SUPPRESS,
        metavar="N",
        help="pixels a side: the central part after the shorter side is resized to N / crop-ratio; "
        "none: images as they are (default: what the model was trained with, else 224)",
    )
    add(
        "--crop-ratio",
        type=float,
        default=argparse.SUPPRESS,
        metavar="R",
        help="(default: what the model was trained with, else 0.875)",
    )
    for name, what in (("mean", "subtracted from"), ("std", "then divides")):
        add(
            f"--{name}",
            type=float,
            nargs=3,
            default=argparse.SUPPRESS,
            metavar=("R", "G", "B"),
            help=f"{what} each channel, for values up to 1 (default: the model's, else ImageNet's)",
        )
    add("--dtype", help="of the computation, such as bfloat16 (default: float32)")
    add(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help="for images that cannot be decoded: stop, or skip and report them (default: raise)",
    )
    add(
        "--max-pixels",
        type=int,
        default=2**26,
        metavar="N",
        help="do not decode image files of more pixels (default: 2**26, 200 MB as RGB)",
    )


def size_or_none(text: str) -> int | None:
    """Parses a number, or "none" as None."""
    return None if text == "none" else int(text)


def open_saved(args: argparse.Namespace) -> "SavedModel":
    """Opens the model that the options of `add_saved_model` and `add_inference` describe."""
    from slimconv_jax.inference.saved import open_model

    given = {name: getattr(args, name) for name in _OPENING if name in args}
    return open_model(args.model, **given)


def expand_flag_files(arguments: Sequence[str]) -> list[str]:
    """Replaces each `--flagfile` of a command line with the options in its file.

    Raises:
      ValueError: if a file cannot be read.
    """
    if not any(re.match("--?flagfile(=|$)", argument) for argument in arguments):
        return list(arguments)
    from absl import flags  # imported here since it comes with the extra `train` only

    try:
        expanded = flags.FlagValues().read_flags_from_files(list(arguments), force_gnu=False)
    except (flags.Error, UnicodeDecodeError) as error:
        raise InputError(f"the file of --flagfile cannot be read: {error}") from None
    # Editors on Windows put a byte-order mark before the first line of a file.
    return [a.removeprefix("\ufeff") for a in expanded if not a.startswith("\ufeff#")]
