"""`evaluate`: the accuracy and speed of a saved model or a training run."""

import argparse
from pathlib import Path

from slimconv_jax.commands.options import add_inference, add_saved_model, open_saved
from slimconv_jax.signatures import select

HELP = "loss, top-1, top-5 and speed of a saved model or a training run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `evaluate`."""
    add_saved_model(parser)
    add = parser.add_argument
    add(
        "--data",
        metavar="NAME",
        help="digits, tfds/NAME, image_folder or synthetic (default: the test data of WORKDIR)",
    )
    add(
        "--data-dir",
        metavar="DIR",
        help="image_folder: the directory of the splits; tfds: where TFDS stores its data sets",
    )
    add("--split", help="default: that of the run in WORKDIR, else test")
    add_inference(parser)
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE")


def run(args: argparse.Namespace) -> None:
    """Prints the accuracy and speed of a saved model or a training run."""
    # Imported here since they take seconds.
    import jax

    from slimconv_jax.devices import enable_compilation_cache, find_devices
    from slimconv_jax.files import check_outputs, write_json
    from slimconv_jax.inference.eval_step import describe, describe_skipped
    from slimconv_jax.inference.evaluate import evaluate, find_data

    enable_compilation_cache()
    find_devices()
    check_outputs(args.json)
    saved = open_saved(args)
    source, options = find_data(args.model, args.data, split=args.split, data_dir=args.data_dir)
    print(
        f"{args.model} on {options['name']}, split {options['split']!r}: {len(source)} images of "
        f"{len(source.class_names)} classes; {jax.device_count()} x {jax.devices()[0].device_kind}"
        f"\n{saved.preprocessing}",
        flush=True,
    )
    result = evaluate(saved, source, **select(vars(args), evaluate))
    print(describe(result))
    print(
        "{images_per_second:,.0f} images/s from files to results; on the devices, a batch of "
        "{batch_size} takes {:.1f} ms (median of {batches}, the slowest {:.1f} ms)".format(
            1000 * result["latency_seconds"], 1000 * result["latency_seconds_max"], **result
        )
    )
    if result["skipped"]:
        print(describe_skipped(result["skipped"]))
    if args.json:
        write_json(args.json, {"model": args.model, "data": options, **result})
