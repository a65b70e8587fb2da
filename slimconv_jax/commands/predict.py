"""`predict`: prints the likeliest classes of images."""

import argparse
import json

from slimconv_jax.commands.options import add_inference, add_saved_model, open_saved
from slimconv_jax.errors import printable
from slimconv_jax.signatures import select

HELP = "the likeliest classes of images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `predict`."""
    add_saved_model(parser)
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="files, directories (with all below them), and patterns such as 'photos/**/*.jpg'",
    )
    add_inference(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")


def run(args: argparse.Namespace) -> None:
    """Prints the likeliest classes of images."""
    # Imported here since they take seconds.
    from slimconv_jax.devices import enable_compilation_cache, find_devices
    from slimconv_jax.inference.predict import expand_paths, predict

    enable_compilation_cache()
    find_devices()
    saved = open_saved(args)
    images = expand_paths(args.images)
    predictions = predict(saved, images, **select(vars(args), predict))
    if args.json:
        report = [
            {"image": image, "predictions": [guess._asdict() for guess in guesses]}
            for image, guesses in predictions
        ]
        print(json.dumps(report, indent=2))
        return
    width = max(len(printable(image)) for image in images)
    for position, (image, guesses) in enumerate(predictions):
        if position == 0:
            print(f"{'image':{width}}  probability  class")
        rows = [f"{guess.probability:11.2%}  {guess.name}" for guess in guesses]
        name = printable(image)
        for row in rows or ["cannot be read"]:
            print(f"{name:{width}}  {printable(row)}")
            name = ""
