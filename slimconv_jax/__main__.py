"""The command line beside train.py: models listed, evaluated, tried, exported, and timed."""

import argparse
import dataclasses
import inspect
import json
import os
import shlex
import sys
from pathlib import Path

from slimconv_jax.console import exit_status, prepare_console
from slimconv_jax.errors import InputError, printable
from slimconv_jax.model_tables import print_architectures, print_layers, print_published
from slimconv_jax.models.zoo import describe


def list_command(args: argparse.Namespace) -> None:
    """Prints every architecture, or the published comparison."""
    if args.published:
        print_published()
    else:
        print_architectures()


def summary_command(args: argparse.Namespace) -> None:
    """Prints the layers of one architecture."""
    print_layers(args.name, k=args.k, image_size=args.image_size)


def evaluate_command(args: argparse.Namespace) -> None:
    """Prints how good a saved model or a training run is, and how fast."""
    # Imported here since they take seconds.
    import jax

    from slimconv_jax.data.sources import load_source
    from slimconv_jax.devices import enable_compilation_cache, find_devices
    from slimconv_jax.evaluation import evaluate_saved, preprocessing_of
    from slimconv_jax.saving import read_info
    from slimconv_jax.training.report import describe, describe_skipped
    from slimconv_jax.work_directory import read_run_dataset

    enable_compilation_cache()
    find_devices()
    if args.json and (Path(args.json).is_dir() or not Path(args.json).absolute().parent.is_dir()):
        raise InputError(f"cannot write {args.json}: it is a directory, or lies in none")
    preprocessing = preprocessing_of(read_info(args.model), **_preprocessing_changes(args))
    options = {"name": args.data, "split": args.split or "test"}
    if args.data is None:
        options = read_run_dataset(args.model)
        if not options:
            raise InputError(
                f"{args.model} does not tell on what it was trained, so --data is needed"
            )
        there = options.get("data_dir")
        if there is not None and args.data_dir is None:  # the file may be a stranger's
            raise InputError(
                f"{args.model}/config.json says that its data lie in {there}; to read them from "
                f"there, add --data-dir {shlex.quote(str(there))}"
            )
        options["split"] = args.split or options.get("test_split", "test")
        options = {key: options[key] for key in options if not key.endswith("_split")}
    if args.data_dir is not None:
        options["data_dir"] = args.data_dir
    try:
        inspect.signature(load_source).bind(**options)
    except TypeError as error:  # only from the run's own config.json, which someone has changed
        raise InputError(f"{args.model}/config.json is damaged: {error}") from None
    source = load_source(**options)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(
        f"{args.model} on {options['name']}, split {options['split']!r}: {len(source)} images of "
        f"{len(source.class_names)} classes; {devices}\n{preprocessing}",
        flush=True,
    )
    result = evaluate_saved(
        args.model, source, preprocessing=preprocessing, **_inference_options(args)
    )
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
        report = {"model": args.model, "data": options, **result}
        try:
            Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {args.json}: {error.strerror}") from None


PREPROCESSING = ("image_size", "mean", "std")


def _image_size(text: str) -> int | None:
    return None if text == "none" else int(text)


def _preprocessing_changes(args: argparse.Namespace) -> dict:
    return {key: value for key, value in vars(args).items() if key in PREPROCESSING}


def _inference_options(args: argparse.Namespace) -> dict:
    names = ("batch_size", "dtype", "on_error", "max_pixels", "checkpoint", "ema")
    return {name: getattr(args, name) for name in names}


def predict_command(args: argparse.Namespace) -> None:
    """Prints the likeliest classes of images."""
    # Imported here since they take seconds.
    from slimconv_jax.devices import enable_compilation_cache, find_devices
    from slimconv_jax.evaluation import preprocessing_of
    from slimconv_jax.prediction import expand_paths, predict_saved
    from slimconv_jax.saving import read_info

    enable_compilation_cache()
    find_devices()
    preprocessing = preprocessing_of(read_info(args.model), **_preprocessing_changes(args))
    images = expand_paths(args.images)
    predictions = predict_saved(
        args.model, images, preprocessing=preprocessing, **_inference_options(args)
    )
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


def export_command(args: argparse.Namespace) -> None:
    """Writes a saved model in a format for other programs."""
    # Imported here since they take seconds.
    from slimconv_jax.devices import find_devices
    from slimconv_jax.evaluation import preprocessing_of
    from slimconv_jax.exporting import export_program, output_name
    from slimconv_jax.saving import load_model, read_info, save_model, verify_weights
    from slimconv_jax.torch_interop.checkpoint_file import write_checkpoint
    from slimconv_jax.torch_interop.convert import to_torch

    find_devices()
    changes = _preprocessing_changes(args)
    if args.format not in PROGRAM_USES and (args.input or changes):
        raise InputError(
            f"--input and --image-size are for {' and '.join(PROGRAM_USES)}; {args.format} takes "
            "the weights alone"
        )
    model = load_model(args.model, checkpoint=args.checkpoint, ema=args.ema)
    info = read_info(args.model)
    what = f"{describe(model.config)}, read back and the same"
    if args.format in PROGRAM_USES:
        preprocessing = preprocessing_of(info, **changes)
        height, width, _ = info.get("image_shape", (None, None, 3))
        if preprocessing.image_size is None and height == width:  # those of the training
            preprocessing = dataclasses.replace(preprocessing, image_size=height)
        print(f"{describe(model.config)}: exporting, then running what was exported", flush=True)
        error = export_program(
            model,
            args.output,
            format=args.format,
            preprocessing=preprocessing,
            input=args.input or "float",
            overwrite=args.overwrite,
        )
        size = preprocessing.image_size
        images = "uint8" if args.input == "uint8" else "normalised float32"
        what = (
            f"for {images} images (batch, {size}, {size}, 3); its {output_name(model)} at batch "
            f"sizes 1 and 5 are the model's within {error:.1e} of the largest"
        )
        use = PROGRAM_USES[args.format].format(args.output, output_name(model))
    elif args.format == "torch":
        write_checkpoint(to_torch(model), args.output, overwrite=args.overwrite)
        use = f'net.load_state_dict(torch.load("{args.output}"))'
    else:
        save_model(model, args.output, format=args.format, overwrite=args.overwrite, info=info)
        verify_weights(model, args.output)
        use = f'model = slimconv_jax.load_model("{args.output}")'
    print(f"wrote {args.output}: {what}; in Python:\n  {use}")


PROGRAM_USES = {
    "stablehlo": 'jax.export.deserialize(bytearray(open("{}", "rb").read())).call(images)',
    "onnx": 'onnxruntime.InferenceSession("{}").run(["{}"], {{"images": images}})[0]',
}
"""The formats of `export` that are programs, and how they are run."""


def benchmark_command(args: argparse.Namespace) -> None:
    """Prints how fast architectures are, here and in PyTorch."""
    # PyTorch is to get some of a GPU's memory, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Imported here since they take seconds.
    import jax

    from slimconv_jax import benchmark, benchmark_report
    from slimconv_jax.devices import find_devices

    find_devices()
    implementations = benchmark_report.choose_implementations(
        args.implementation, modes=args.mode, dtypes=args.dtype
    )
    groups = benchmark.plan(
        args.models,
        modes=args.mode,
        batch_sizes=args.batch_size,
        image_size=args.image_size,
        dtypes=args.dtype,
        implementations=implementations,
    )
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    benchmark_report.run(
        groups,
        repeats=args.repeats,
        command=shlex.join(["python", "-m", "slimconv_jax", *args.argv]),
        json_path=args.json,
        chart_path=args.chart,
    )


def plan_command(args: argparse.Namespace) -> None:
    """Prints what a training run needs on devices that are not here."""
    # Imported here since they take seconds.
    from slimconv_jax import planning_report

    planning_report.run(
        args.config,
        args.overrides,
        topology=args.topology,
        num_classes=args.num_classes,
        image_size=args.image_size,
        fit=args.fit,
        json_path=args.json,
    )


SAVED_MODEL = "a directory of save_model or convert_weights.py, or the work directory of train.py"


def _add_saved_model(command: argparse.ArgumentParser) -> None:
    """The arguments that say which saved weights are meant."""
    command.add_argument("model", metavar="MODEL_OR_WORKDIR", help=SAVED_MODEL)
    command.add_argument(
        "--checkpoint",
        type=int,
        metavar="STEP",
        help="of a work directory, the checkpoint of this step (default: the newest)",
    )
    command.add_argument(
        "--ema",
        action="store_true",
        help="of a work directory, the averaged weights (config.step.ema_decay)",
    )


def _add_inference(command: argparse.ArgumentParser) -> None:
    """The arguments that say how images come to a model."""
    add = command.add_argument
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


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    prepare_console(needs_stdout=True)
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m slimconv_jax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "list", help="every architecture: k, parameters, multiply-adds, published figures"
    )
    command.add_argument(
        "--published",
        action="store_true",
        help="the paper's comparison instead: published and counted parameters and FLOPs, error",
    )
    command.set_defaults(run=list_command)

    command = commands.add_parser(
        "summary", help="one architecture, layer by layer: shapes, parameters, multiply-adds"
    )
    command.add_argument(
        "name", help="an architecture, as `list` names it, or a JSON file of channels"
    )
    command.add_argument("--k", help="compression ratio of a Sc model, such as 8/3")
    command.add_argument(
        "--image-size", type=int, default=224, metavar="N", help="pixels a side (default: 224)"
    )
    command.set_defaults(run=summary_command)

    command = commands.add_parser(
        "evaluate", help="loss, top-1, top-5 and speed of a saved model or a training run"
    )
    command.set_defaults(run=evaluate_command)
    add = command.add_argument
    _add_saved_model(command)
    add(
        "--data",
        metavar="NAME",
        help="digits, tfds/NAME, image_folder or synthetic "
        "(default: what the run in WORKDIR was tested on)",
    )
    add(
        "--data-dir",
        metavar="DIR",
        help="image_folder: the directory of the splits; tfds: where TFDS keeps its data sets",
    )
    add("--split", help="default: that of the run in WORKDIR, else test")
    _add_inference(command)
    add("--json", metavar="FILE", help="write the figures here too")

    command = commands.add_parser("predict", help="the likeliest classes of images")
    command.set_defaults(run=predict_command)
    _add_saved_model(command)
    command.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="files, directories with all below, and patterns such as 'photos/**/*.jpg'",
    )
    _add_inference(command)
    command.add_argument(
        "--json", action="store_true", help="print a JSON list in place of the table"
    )

    command = commands.add_parser("export", help="a saved model or training run, in another format")
    _add_saved_model(command)
    command.add_argument("output", metavar="OUT", help="the new file or directory")
    command.add_argument(
        "--format",
        choices=[*PROGRAM_USES, "torch", "orbax", "safetensors"],
        required=True,
        help="stablehlo, onnx: a program from images to logits, of any batch size, with batch "
        "norm folded; torch: a state dict with the names of the released files; orbax, "
        "safetensors: a directory for load_model, with weights in that format",
    )
    command.add_argument(
        "--input",
        choices=["float", "uint8"],
        help="what a program takes: float, images as the model takes them, normalised (default); "
        "uint8, pixels, which it normalises itself",
    )
    command.add_argument(
        "--image-size",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="pixels a side of a program's images (default: what the model was trained with, "
        "else 224)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace what is at OUT")
    command.set_defaults(run=export_command)

    command = commands.add_parser(
        "benchmark", help="images a second of architectures, here and in PyTorch, on this device"
    )
    command.set_defaults(run=benchmark_command)
    add = command.add_argument
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

    command = commands.add_parser(
        "plan",
        help="what a training run needs on TPUs or GPUs that are not here, by their compilers",
        usage="%(prog)s --config FILE --topology NAME [options] [--config.KEY=VALUE ...]",
    )
    command.set_defaults(run=plan_command)
    add = command.add_argument
    add("--config", metavar="FILE", required=True, help="such as configs/imagenet_sc_resnet50.py")
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
        help="where it does not fit, compile it with remat, in parts and with smaller batches, too",
    )
    for name, what in (("num-classes", "classes"), ("image-size", "pixels a side")):
        add(
            f"--{name}",
            type=int,
            metavar="N",
            help=f"{what}, where the data are not here (default: as in ImageNet)",
        )
    add("--json", type=Path, metavar="FILE", help="write the figures here too")

    args, rest = parser.parse_known_args(argv)
    args.overrides = [text for text in rest if text.startswith("--config.") and "=" in text]
    unknown = [text for text in rest if text not in args.overrides or args.run is not plan_command]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.argv = argv
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
