"""`plan`: the needs of a training run on devices that are not here."""

import argparse
from pathlib import Path

from slimconv_jax.signatures import select

HELP = "what a training run needs on TPUs or GPUs that are not here, by their compilers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `plan`."""
    parser.usage = "%(prog)s --config FILE --topology NAME [options] [--config.KEY=VALUE ...]"
    parser.set_defaults(takes_overrides=True, extra="plan")
    add = parser.add_argument
    add(
        "--config",
        metavar="FILE",
        required=True,
        help="a file, or a name such as imagenet:sc_resnet50",
    )
    add(
        "--topology",
        metavar="NAME",
        required=True,
        help="slices of TPUs: v5e:4x4, v5p:2x2x2 or v6e:4x4 (v5e:1 for one chip); the GPUs of a "
        "host: h100:8 or a100:8, of two: h100:2x8",
    )
    add(
        "--fit",
        action="store_true",
        help="if it does not fit, also compile it with remat, in parts and with smaller batches",
    )
    for name, what in (("num-classes", "classes"), ("image-size", "pixels a side")):
        add(
            f"--{name}",
            type=int,
            metavar="N",
            help=f"{what}, if the data are not here (default: as in ImageNet)",
        )
    add("--json", dest="json_path", type=Path, metavar="FILE", help="write the figures to FILE")


def run(args: argparse.Namespace) -> None:
    """Prints what a training run needs on devices that are not here."""
    # Imported here since they take seconds.
    from slimconv_jax.benchmark import planning_report

    planning_report.run(args.config, args.overrides, **select(vars(args), planning_report.run))
