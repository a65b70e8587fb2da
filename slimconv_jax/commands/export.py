"""`export`: writes a saved model in a format for other programs."""

import argparse

from slimconv_jax.commands.options import add_saved_model, open_saved
from slimconv_jax.signatures import select

HELP = "a saved model or training run, in another format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `export`."""
    parser.set_defaults(extra="export")
    add_saved_model(parser)
    add = parser.add_argument
    add("output", metavar="OUT", help="the new file or directory")
    add(
        "--format",
        metavar="NAME",
        required=True,
        help="stablehlo, onnx: a program from images to logits, of any batch size, with batch "
        "norm folded; torch: a state dict with the names of the released files; orbax, "
        "safetensors: a directory for load_model, with weights in that format",
    )
    add(
        "--input",
        metavar="TYPE",
        help="input of a program: float, normalised images as the model takes them (default); "
        "uint8, pixels that the program normalises itself",
    )
    add(
        "--image-size",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="pixels a side of a program's images (default: as in training, else 224)",
    )
    add("--overwrite", action="store_true", help="replace what is at OUT")


def run(args: argparse.Namespace) -> None:
    """Writes a saved model in a format for other programs."""
    # Imported here since they take seconds.
    from slimconv_jax.devices import find_devices
    from slimconv_jax.inference.export import check_format, export
    from slimconv_jax.models.zoo import describe

    find_devices()
    check_format(args.format, **select(vars(args), check_format))
    saved = open_saved(args)
    print(f"{describe(saved.model.config)}: exporting, then reading it back", flush=True)
    done = export(saved, args.output, **select(vars(args), export))
    print(f"wrote {args.output}: {done.what}; in Python:\n  {done.use}")
