"""What several commands ask for: which saved model, and how images come to it."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimconv_jax.errors import InputError

if TYPE_CHECKING:
    from slimconv_jax.inference.saved import SavedModel

_OPENING = ("checkpoint", "ema", "dtype", "image_size", "mean", "std")
"""The options that are arguments of `open_model`."""


def add_saved_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which saved weights are meant."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL_OR_WORKDIR",
        help="a directory of save_model or `convert`, or the work directory of `train`",
    )
    add(
        "--checkpoint",
        type=int,
        metavar="STEP",
        help="of a work directory, the checkpoint of this step (default: the newest)",
    )
    add(
        "--ema",
        action="store_true",
        help="of a work directory, the averaged weights (config.step.ema_decay)",
    )


def add_inference(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how images come to a model."""
    add = parser.add_argument
    add("--batch-size", type=int, default=64, metavar="N", help="images at once (default: 64)")
    add(
        "--image-size",
        type=_image_size,
        default=argparse.SUPPRESS,
        metavar="N",
        help="pixels a "
        "side: the central part after the shorter side is resized to 8/7 of that; none: images as "
        "they are (default: what the model was trained with, else 224)",
    )
    for name, what in (("mean", "subtracted from"), ("std", "that then divides")):
        add(
            f"--{name}",
            type=float,
            nargs=3,
            default=argparse.SUPPRESS,
            metavar=("R", "G", "B"),
            help=f"{what} each channel, of values up to 1 (default: what the model was trained "
            "with, else ImageNet's)",
        )
    add("--dtype", help="of the computation, such as bfloat16 (default: float32)")
    add(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help="for images that cannot be "
        "decoded: stop, or leave them out and say so (default: raise)",
    )
    add(
        "--max-pixels",
        type=int,
        default=2**26,
        metavar="N",
        help="an image file of more pixels is not decoded (default: 2**26, 200 MB as RGB)",
    )


def _image_size(text: str) -> int | None:
    return None if text == "none" else int(text)


def open_saved(args: argparse.Namespace) -> "SavedModel":
    """The model that `add_saved_model` and `add_inference` ask for."""
    from slimconv_jax.inference.saved import open_model

    return open_model(args.model, **select(args, *_OPENING))


def select(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of some options that are given or have a default."""
    return {name: getattr(args, name) for name in names if name in args}


def expand_flag_files(arguments: Sequence[str]) -> list[str]:
    """A command line with what is in the files of `--flagfile` in their place.

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
