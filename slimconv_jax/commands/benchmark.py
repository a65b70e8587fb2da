"""`benchmark`: how fast architectures are, here and in PyTorch."""

import argparse
import os
import shlex
from pathlib import Path

HELP = "images a second of architectures, here and in PyTorch, on this device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark`."""
    add = parser.add_argument
    add(
        "models",
        metavar="MODEL",
        nargs="*",
        default=["sc_resnet50", "sc_resnet50@8/3", "resnet50"],
        help="NAME or NAME@K, such as sc_resnet50@8/3 (default: sc_resnet50, sc_resnet50@8/3 and "
        "resnet50)",
    )
    add(
        "--mode",
        nargs="+",
        choices=["inference", "train"],
        default=["inference"],
        help="inference: with batch norm folded; train: a whole step (default: inference)",
    )
    add(
        "--batch-size",
        type=int,
        nargs="+",
        default=[8],
        metavar="N",
        help="images at once (default: 8)",
    )
    add("--image-size", type=int, default=224, metavar="N", help="pixels a side (default: 224)")
    add(
        "--dtype",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32"],
        help="of the computation (default: float32)",
    )
    add(
        "--implementation",
        nargs="+",
        choices=["jax", "torch", "torch.compile", "onnxruntime"],
        help="what to measure; onnxruntime runs what `export` writes (default: jax, and torch if "
        "it is installed)",
    )
    add("--repeats", type=int, default=10, metavar="N", help="turns (default: 10)")
    add("--json", type=Path, metavar="FILE", help="write the figures here too")
    add("--chart", type=Path, metavar="FILE", help="draw them here, as .png, .svg or .pdf")


def run(args: argparse.Namespace) -> None:
    """Prints how fast architectures are, here and in PyTorch."""
    # PyTorch is to get some of a GPU's memory, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Imported here since they take seconds.
    import jax

    from slimconv_jax.benchmark import measure, report
    from slimconv_jax.devices import find_devices

    find_devices()
    implementations = report.choose_implementations(
        args.implementation, modes=args.mode, dtypes=args.dtype
    )
    groups = measure.plan(
        args.models,
        modes=args.mode,
        batch_sizes=args.batch_size,
        image_size=args.image_size,
        dtypes=args.dtype,
        implementations=implementations,
    )
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    report.run(
        groups,
        repeats=args.repeats,
        command=shlex.join(args.command_line),
        json_path=args.json,
        chart_path=args.chart,
    )
