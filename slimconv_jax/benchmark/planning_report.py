"""What `plan` prints and writes of a run on devices that need not be here."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import ml_collections

from slimconv_jax.benchmark import planning
from slimconv_jax.benchmark.report import check_outputs, write_json
from slimconv_jax.console import Status
from slimconv_jax.data.datasets import load_splits
from slimconv_jax.data.transforms import Transform
from slimconv_jax.errors import InputError, require_integer
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
      topology: such as "v5e:4x4"; see `planning.describe_topologies`.
      num_classes: of the data; None for those that are here, else 1000.
      image_size: pixels a side; None for those of the config or the data that are here, else 224.
      fit: whether to try what helps where the training step does not fit.
      json_path: where to write the figures, too.

    Raises:
      ValueError: if something cannot be used.
    """
    check_outputs(json_path)
    config = read_config(config_path, overrides)
    device, devices = planning.get_devices(topology)
    check_config(config, len(devices))
    num_classes, image_shape, assumed = _data(config, num_classes, image_size)
    count = len(devices)

    def compile_steps(config: ml_collections.ConfigDict, names: Sequence[str]) -> dict:
        """An account of each step, or in words what the compiler says where it does not fit."""
        programs = planning.lower_steps(
            config, devices, num_classes=num_classes, image_shape=image_shape
        )
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
        f"{describe(model.config)}, images of {'x'.join(map(str, image_shape[:2]))}{assumed}\n"
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
    tried: dict[str, bool] = {}

    def write() -> None:
        if not json_path:
            return
        report = {
            "topology": topology,
            "config": json.loads(config.to_json_best_effort()),
            "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
            "device": dataclasses.asdict(device) | {"gpu": device.gpu is not None},
            "devices": count,
            "steps": {
                name: account if isinstance(account, str) else _as_dict(account)
                for name, account in accounts.items()
            },
            "tried": tried,
        }
        write_json(json_path, report)

    write()
    training = accounts["training"]
    if fit and (isinstance(training, str) or not training.fits):

        def fits(changed: ml_collections.ConfigDict) -> bool:
            found = compile_steps(changed, ["training"])["training"]
            return not isinstance(found, str) and found.fits

        print("\nwhat helps, each tried by itself", flush=True)
        with Status() as status:
            for change, helps in planning.find_fit(config, fits, count):
                tried[change] = helps
                print(f"  {change:40} {'fits' if helps else 'does not fit'}", flush=True)
                write()


def _as_dict(account: planning.Account) -> dict[str, Any]:
    return dataclasses.asdict(account) | {"fits": account.fits, "seconds": account.seconds}


def _data(
    config: ml_collections.ConfigDict, num_classes: int | None, image_size: int | None
) -> tuple[int, tuple[int, int, int], str]:
    """The number of classes, the shape of the images, and what of it is assumed, in words."""
    for name, value in (("--num-classes", num_classes), ("--image-size", image_size)):
        if value is not None:
            require_integer(name, value, 1)
    image_size = image_size or Transform(**config.transform).image_size
    assumed, reason = [], ""
    if num_classes is None or image_size is None:
        try:
            train, _ = load_splits(**config.dataset)
        except InputError as error:  # not here, which a plan does not need
            reason = f" ({error})"
            assumed += [] if num_classes else ["1000 classes (--num-classes)"]
            assumed += [] if image_size else ["224 pixels (--image-size)"]
            num_classes, image_size = num_classes or 1000, image_size or 224
        else:
            num_classes = num_classes or len(train.class_names)
            if image_size is None:
                return num_classes, train[0].image.shape, ""
    words = f"; without the data{reason}, assumed: {', '.join(assumed)}" if assumed else ""
    return num_classes, (image_size, image_size, 3), words


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"


def print_account(account: planning.Account, images: int) -> None:
    """The lines of one step that computes so many images on all devices together."""
    gib = 2**30
    room = account.device_bytes - account.peak_bytes
    verdict = f"fits, {room / gib:.2f} GiB to spare" if room >= 0 else "DOES NOT FIT"
    bound = "bytes" if account.bytes_seconds >= account.flops_seconds else "FLOPs"
    rows = {
        "memory": f"{account.peak_bytes / gib:.2f} of {account.device_bytes / gib:.2f} GiB: "
        f"{verdict} (arguments {account.argument_bytes / gib:.2f}, temporary "
        f"{account.temporary_bytes / gib:.2f})",
        "work": f"{account.flops / 1e9:,.1f} GFLOP, at least {_time(account.flops_seconds)}; "
        f"{account.bytes_accessed / 1e9:.2f} GB, at least {_time(account.bytes_seconds)}; "
        f"bound by {bound}",
        "operations": f"{account.kernels:,}, one after the other",
    }
    if account.estimated_seconds:
        rows["estimate"] = f"{_time(account.estimated_seconds)} by the compiler, "
    else:
        rows["estimate"] = f"{_time(account.seconds)} if all these bytes come from memory, "
    rate = float(f"{images / account.seconds:.3g}")  # an estimate is not good for more digits
    rows["estimate"] += f"that is {rate:,.0f} images/s on all devices"
    shares = sorted(account.shares.items(), key=lambda item: -item[1])
    what = "of the estimate" if account.estimated_seconds else "of the bytes"
    parts = ", ".join(f"{part} {share:.0%}" for part, share in shares if share >= 0.005)
    rows["parts"] = f"{what}: {parts}"
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(account.collectives.items()))
    rows["collectives"] = counts or "none"
    if counts:
        rows["collectives"] += f", {account.collective_bytes / 1e6:,.1f} MB"
    rows["compiled"] = f"in {math.ceil(account.compile_seconds)} s on this machine"
    for name, text in rows.items():
        print(f"  {name:12} {text}")
