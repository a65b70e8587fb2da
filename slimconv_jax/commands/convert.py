"""`convert`: the weights of a PyTorch checkpoint, and whether the model computes the same."""

import argparse

HELP = "the weights of a PyTorch checkpoint, compared with PyTorch"

_DESCRIPTION = """Imports the weights of a PyTorch checkpoint, and checks that the model computes
the same.

OUTPUT becomes a directory that slimconv_jax.load_model opens. The architecture is read off the
shapes. What leaves no trace in them is taken to be as published: strides, dilation, activations,
anti-aliasing, the epsilon of batch norm. The model is compared with the published network in
PyTorch, with the weights of the file, on the same images; if they differ, nothing is written. It is
not compared with the network of the file's author, which the file does not hold.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `convert`."""
    parser.description = _DESCRIPTION
    parser.set_defaults(interrupted="interrupted; nothing was written")
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a file of torch.save, .safetensors, "
        ".npz, .pkl or .msgpack; of a model in several files the index or one of them",
    )
    add("output", metavar="OUTPUT", help="the new directory")
    add("--overwrite", action="store_true", help="replace a model that is at OUTPUT already")
    add(
        "--format",
        choices=["orbax", "safetensors"],
        default="orbax",
        help="of the weights (default: orbax)",
    )
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
        help="the name of each class, one a line, for model.json (for ImageNet the sorted WordNet "
        "IDs, n01440764 and so on); evaluate matches them with those of the data",
    )
    group = parser.add_argument_group("comparison with PyTorch")
    add = group.add_argument
    add("--no-parity", dest="parity", action="store_false", help="leave it out")
    add("--images", metavar="DIR", help="compare on images from here, not on random numbers")
    add("--num-images", type=int, default=8, metavar="N", help="how many (default: 8)")
    add("--image-size", type=int, metavar="N", help="pixels a side (default: 224; small stem: 32)")
    add(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="allowed error in float32, relative to the largest value of each output; beyond it, a "
        "ten thousandth of it in float64 decides (default: %(default)s)",
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
    from slimconv_jax.signatures import select
    from slimconv_jax.torch_interop.convert_checkpoint import convert_checkpoint

    enable_compilation_cache()
    find_devices()
    convert_checkpoint(**select(vars(args), convert_checkpoint))
