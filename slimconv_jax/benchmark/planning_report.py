"""The output of `plan`: the needs of a run on devices that need not be here."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib
import ml_collections

from slimconv_jax.benchmark import planning
from slimconv_jax.console import Status
from slimconv_jax.data.datasets import load_splits
from slimconv_jax.data.loader import image_shape
from slimconv_jax.data.transforms import Transform
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.files import check_outputs, write_json
from slimconv_jax.models.zoo import abstract_model, describe
from slimconv_jax.training.config import check_config, read_config


def run(
    config_path: str,
    overrides: Sequence[str],
    *,
    topology: str,
    num_classes: int | None = None,
    image_size: int | None = None,
    fit: bool = False,
    json_path: Path | None = None,
) -> None:
    """Compiles the steps of a run for a topology, and prints what they need.

    Args:
      config_path: a file in `configs/`.
      overrides: of the config, each as in "--config.model.k=8/3".
      topology: such as "v5e:4x4"; see `planning.TOPOLOGIES`.
      num_classes: of the data; None to read it from the data if they are here, else 1000.
      image_size: pixels a side; None for that of the config or of the data if they are here, else
        224.
      fit: whether to try what helps if the training step does not fit.
      json_path: a file for the figures; None for none.

    Raises:
      ValueError: if an argument cannot be used.
    """
    check_outputs(json_path)
    config = read_config(config_path, overrides)
    device, devices = planning.get_devices(topology)
    check_config(config, len(devices))
    num_classes, shape, assumed = _data_shape(config, num_classes, image_size)
    count = len(devices)

    def compile_steps(config: ml_collections.ConfigDict, names: Sequence[str]) -> dict:
        """Returns an account of each step, or the compiler's message if it does not fit."""
        programs = planning.lower_steps(config, devices, num_classes=num_classes, image_shape=shape)
        accounts = {}
        for name in names:
            status.update(f"compiling the {name} step for {count} x {device.name}")
            try:
                accounts[name] = planning.compile_account(programs[name], device, count)
            except planning.DoesNotFitError as error:
                accounts[name] = str(error)
        return accounts

    with Status() as status:
        accounts = compile_steps(config, planning.STEPS)
    model = abstract_model(num_classes=num_classes, **config.model)
    print(
        f"{describe(model.config)}, images of {'x'.join(map(str, shape[:2]))}{assumed}\n"
        f"compiled for {count} x {device.name} ({device.memory / 2**30:.1f} GiB, "
        f"{device.bandwidth / 1e9:,.0f} GB/s, {device.flops / 1e12:,.0f} TFLOP/s each; "
        f"{device.source})\n"
        f"by jax {jax.__version__}, jaxlib {jaxlib.__version__}; per device, counted or estimated, "
        "not measured"
    )
    sizes = {"training": config.batch_size, "evaluation": config.eval_batch_size}
    for name, account in accounts.items():
        print(f"\n{name} step, {sizes[name]} images")
        if isinstance(account, str):
            print(f"  does not fit: {account or 'the compiler has no room for it'}")
        else:
            print_account(account, sizes[name])
    report = {
        "topology": topology,
        "config": json.loads(config.to_json_best_effort()),
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "device": dataclasses.asdict(device) | {"gpu": device.gpu is not None},
        "devices": count,
        "steps": {
            name: account
            if isinstance(account, str)
            else dataclasses.asdict(account) | {"fits": account.fits, "seconds": account.seconds}
            for name, account in accounts.items()
        },
        "tried": {},
    }
    if json_path:
        write_json(json_path, report)
    if not fit or _fits(accounts["training"]):
        return
    print("\nwhat helps, each tried by itself", flush=True)
    with Status() as status:
        attempts = planning.find_fit(
            config, lambda changed: _fits(compile_steps(changed, ["training"])["training"]), count
        )
        for change, helps in attempts:
            print(f"  {change:40} {'fits' if helps else 'does not fit'}", flush=True)
            report["tried"][change] = helps
            if json_path:
                write_json(json_path, report)


def _fits(account: planning.Account | str) -> bool:
    return not isinstance(account, str) and account.fits


def _data_shape(
    config: ml_collections.ConfigDict, num_classes: int | None, image_size: int | None
) -> tuple[int, tuple[int, int, int], str]:
    """Returns the number of classes, the shape of the images, and what is assumed, in words."""
    for name, value in (("--num-classes", num_classes), ("--image-size", image_size)):
        if value is not None:
            require_integer(name, value, 1)
    transform = Transform(**config.transform)
    height = width = image_size or transform.image_size
    assumed = ""
    if not (num_classes and height):
        try:
            train, _ = load_splits(**config.dataset)
        except InputError as error:  # not here; a plan does not need the data
            missing = [] if num_classes else ["1000 classes (--num-classes)"]
            missing += [] if height else ["224 pixels (--image-size)"]
            assumed = f"; without the data ({error}), assumed: {', '.join(missing)}"
            num_classes, height, width = num_classes or 1000, height or 224, width or 224
        else:
            num_classes = num_classes or len(train.class_names)
            if not height:
                height, width, _ = image_shape(train, transform, "raise")
    return num_classes, (height, width, 3), assumed


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"


def print_account(account: planning.Account, images: int) -> None:
    """Prints the lines of one step, which computes `images` on all devices together."""
    gib = 2**30
    room = account.device_bytes - account.peak_bytes
    verdict = f"fits, {room / gib:.2f} GiB to spare" if room >= 0 else "DOES NOT FIT"
    bound = "bytes" if account.bytes_seconds >= account.flops_seconds else "FLOPs"
    source, share_of = "if all these bytes come from memory", "bytes"
    if account.estimated_seconds:
        source, share_of = "by the compiler", "estimate"
    rate = float(f"{images / account.seconds:.3g}")  # an estimate is not good for more digits
    shares = sorted(account.shares.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{part} {share:.0%}" for part, share in shares if share >= 0.005)
    collectives = [f"{count} {kind}" for kind, count in sorted(account.collectives.items())]
    collectives += [f"{account.collective_bytes / 1e6:,.1f} MB"] if collectives else ["none"]
    rows = {
        "memory": f"{account.peak_bytes / gib:.2f} of {account.device_bytes / gib:.2f} GiB: "
        f"{verdict} (arguments {account.argument_bytes / gib:.2f}, temporary "
        f"{account.temporary_bytes / gib:.2f})",
        "work": f"{account.flops / 1e9:,.1f} GFLOP, at least {_time(account.flops_seconds)}; "
        f"{account.bytes_accessed / 1e9:.2f} GB, at least {_time(account.bytes_seconds)}; "
        f"bound by {bound}",
        "operations": f"{account.kernels:,}, one after the other",
        "estimate": f"{_time(account.seconds)} {source}, that is {rate:,.0f} images/s on all "
        "devices",
        "parts": f"of the {share_of}: {parts}",
        "collectives": ", ".join(collectives),
        "compiled": f"in {math.ceil(account.compile_seconds)} s on this machine",
    }
    for name, text in rows.items():
        print(f"  {name:12} {text}")
