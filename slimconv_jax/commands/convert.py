"""`convert`: imports the weights of a PyTorch checkpoint, and compares the model with PyTorch."""

import argparse

from slimconv_jax.signatures import select

HELP = "import the weights of a PyTorch checkpoint, and compare with PyTorch"

_DESCRIPTION = """Imports the weights of a PyTorch checkpoint, and checks that the model computes
the same.

OUTPUT becomes a directory that slimconv_jax.load_model opens. The architecture is read off the
shapes. Anything that leaves no trace in them is assumed to be as published: strides, dilation,
activations, anti-aliasing, the epsilon of batch norm. The model is compared with the published
network in PyTorch, with the weights of the file, on the same images; if they differ, nothing is
written. The network of the file's author is not in the file, so it is not compared.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `convert`."""
    parser.description = _DESCRIPTION
    parser.set_defaults(interrupted="interrupted; nothing was written", extra="torch")
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a file of torch.save, .safetensors, .npz, .pkl or .msgpack; for a model in several "
        "files, the index or one of them",
    )
    add("output", metavar="OUTPUT", help="the new directory")
    add("--overwrite", action="store_true", help="replace a model that is already at OUTPUT")
    add(
        "--format",
        choices=["orbax", "safetensors"],
        default="orbax",
        help="of the weights (default: orbax)",
    )
    add(
        "--arch",
        metavar="NAME",
        help="fail unless this is the architecture, at any k; or a JSON file of channels, which a "
        "network of irregular widths needs",
    )
    add("--k", metavar="K", help="fail unless this is the compression ratio, such as 8/3")
    add(
        "--gating",
        choices=["flipped", "plain", "upper"],
        help="what the gates of the SlimConvs do, which shapes do not show (default: flipped, as "
        "published)",
    )
    add("--key", help="path of the state dict in the file, if it is not found: keys with dots")
    add(
        "--rename",
        dest="renames",
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
        help="the name of each class, one per line, for model.json (for ImageNet the sorted "
        "WordNet IDs, n01440764 and so on); evaluate matches them with those of the data",
    )
    group = parser.add_argument_group("comparison with PyTorch")
    add = group.add_argument
    add("--no-parity", dest="parity", action="store_false", help="skip the comparison")
    add("--images", metavar="DIR", help="compare on images from DIR, not on random numbers")
    add("--num-images", type=int, default=8, metavar="N", help="how many (default: 8)")
    add("--image-size", type=int, metavar="N", help="pixels a side (default: 224; small stem: 32)")
    add(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="allowed error in float32, relative to the largest value of each output; beyond it, "
        "the error in float64 must be within a ten-thousandth of it (default: %(default)s)",
    )


def parse_rename(text: str) -> tuple[str, str]:
    """Splits REGEX=REPLACEMENT at the last equals sign."""
    pattern, equals, replacement = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form REGEX=REPLACEMENT")
    return pattern, replacement


def run(args: argparse.Namespace) -> None:
    """Converts a checkpoint."""
    # Imported here since they take seconds.
    from slimconv_jax.devices import enable_compilation_cache, find_devices
    from slimconv_jax.torch_interop.convert_checkpoint import convert_checkpoint

    enable_compilation_cache()
    find_devices()
    options = select(vars(args), convert_checkpoint)
    convert_checkpoint(args.checkpoint, args.output, **options)
