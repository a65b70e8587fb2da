"""`benchmark`: how fast architectures run, here and in PyTorch."""

import argparse
import os
import shlex
from pathlib import Path

from slimconv_jax.signatures import select

HELP = "images per second of architectures, here and in PyTorch, on this device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark`."""
    add = parser.add_argument
    add(
        "models",
        metavar="MODEL",
        nargs="*",
        default=["sc_resnet50", "sc_resnet50@8/3", "resnet50"],
        help="NAME or NAME@K (default: sc_resnet50, sc_resnet50@8/3 and resnet50)",
    )
    add(
        "--mode",
        dest="modes",
        nargs="+",
        choices=["inference", "train"],
        default=["inference"],
        help="inference: with batch norm folded; train: a whole step (default: inference)",
    )
    add(
        "--batch-size",
        dest="batch_sizes",
        type=int,
        nargs="+",
        default=[8],
        metavar="N",
        help="images per batch (default: 8)",
    )
    add("--image-size", type=int, default=224, metavar="N", help="pixels a side (default: 224)")
    add(
        "--dtype",
        dest="dtypes",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32"],
        help="of the computation (default: float32)",
    )
    add(
        "--implementation",
        dest="implementations",
        nargs="+",
        choices=["jax", "torch", "torch.compile", "onnxruntime"],
        help="onnxruntime runs the output of `export` (default: jax, and torch if it is installed)",
    )
    add("--repeats", type=int, default=10, metavar="N", help="turns (default: 10)")
    add("--json", dest="json_path", type=Path, metavar="FILE", help="write the figures to FILE")
    add("--chart", dest="chart_path", type=Path, metavar="FILE", help="draw a .png, .svg or .pdf")


def run(args: argparse.Namespace) -> None:
    """Prints how fast architectures run, here and in PyTorch."""
    # Leaves some of a GPU's memory to PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Imported here since they take seconds.
    import jax

    from slimconv_jax.benchmark import measure, report
    from slimconv_jax.devices import find_devices

    find_devices()
    args.implementations = report.choose_implementations(
        args.implementations, modes=args.modes, dtypes=args.dtypes
    )
    groups = measure.plan(args.models, **select(vars(args), measure.plan))
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    command = shlex.join(args.command_line)
    report.run(groups, command=command, **select(vars(args), report.run))
