"""What training steps and inference need on accelerators that are not here, by their compilers.

    python benchmarks/compiled_for.py [--models NAME@K ...] [--topologies v5e:1 h100:1 ...] \
        [--modes train inference] [--batch-size N] [--parts] [--json FILE]

A row for each model, device and mode: temporary memory, FLOPs, bytes, the compiler's estimate
(TPU) or the least time that FLOPs and bytes need (GPU), and its ratio to that of resnet50. With
--parts, then, of each part of the network, the bytes that it moves, the least time that they need,
and the compiler's estimate (TPU).
`linen_resnet50` is the peer: a ResNet-50 in Flax Linen as Flax's own ImageNet example writes it.
Nothing is measured. With --json, rows that the file has already are not compiled again. Needs the
extra `plan`.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from flax import nnx
from scripts import run_script

import slimconv_jax as sc
from slimconv_jax.benchmark.planning import (
    DoesNotFitError,
    Lowered,
    compile_account,
    get_devices,
    lower_steps,
)
from slimconv_jax.console import Status
from slimconv_jax.data.preprocessing import normalize
from slimconv_jax.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from slimconv_jax.devices import batch_sharded, data_mesh, replicated
from slimconv_jax.files import check_outputs, write_json
from slimconv_jax.models.complexity import count_program_macs
from slimconv_jax.models.zoo import parse_model
from slimconv_jax.training.config import read_config
from slimconv_jax.training.setup import create_normalize

PEER = "linen_resnet50"
BASELINE = "resnet50"
CONFIG = Path(__file__).parents[1] / "configs/imagenet.py:resnet50"
CLASSES, SIZE = 1000, 224


class LinenBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, in Linen's own layers."""

    planes: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=jnp.bfloat16
        )
        y = nn.relu(norm()(conv(self.planes, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.planes, (3, 3), self.strides)(y)))
        y = norm(scale_init=nn.initializers.zeros)(conv(4 * self.planes, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.planes, (1, 1), self.strides)(x))
        return nn.relu(x + y)


class LinenResNet50(nn.Module):
    """The peer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(64, (7, 7), 2, padding=3, use_bias=False, dtype=jnp.bfloat16)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=jnp.bfloat16)(x)
        x = nn.max_pool(nn.relu(x), (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                strides = 2 if stage and not block else 1
                x = LinenBottleneck(64 * 2**stage, strides)(x, train)
        return nn.Dense(CLASSES, dtype=jnp.bfloat16)(x.mean(axis=(1, 2))).astype(jnp.float32)


def lower_peer(mode: str, batch_size: int, devices: list) -> Lowered:
    """The peer's training step, with the optimiser of the recipe, or its inference."""
    model, mesh = LinenResNet50(), data_mesh(devices)
    prepare = create_normalize(read_config(CONFIG, []))
    images = jax.ShapeDtypeStruct((batch_size, SIZE, SIZE, 3), jnp.uint8)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)), True)
    )
    shardings = replicated(mesh), batch_sharded(mesh)
    if mode == "inference":

        def forward(variables, images):
            return model.apply(variables, prepare(images), False)

        return lowered(jax.jit(forward, in_shardings=shardings), variables, images)
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))

    def step(state, batch):
        params, stats, opt_state = state

        def loss_fn(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": stats},
                prepare(batch["image"]),
                True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean(), (updates["batch_stats"], logits)

        (loss, (stats, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        accuracy = (logits.argmax(axis=-1) == batch["label"]).mean()
        metrics = {"loss": loss, "accuracy": accuracy, "grad_norm": optax.tree.norm(grads)}
        return (optax.apply_updates(params, updates), stats, opt_state), metrics

    params = variables["params"]
    state = (params, variables["batch_stats"], jax.eval_shape(optimizer.init, params))
    batch = {"image": images, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    function = jax.jit(step, in_shardings=shardings, donate_argnums=0)
    return lowered(function, state, batch)


def lowered(function: Any, *args: Any) -> Lowered:
    traced = function.trace(*args)
    return Lowered(traced.lower(), count_program_macs(traced.jaxpr.jaxpr))


def lower_model(text: str, mode: str, batch_size: int, devices: list) -> Lowered:
    """The recipe's training step of a model, or its inference with batch norm folded."""
    if text == PEER:
        return lower_peer(mode, batch_size, devices)
    name, k = parse_model(text)
    if mode == "train":
        config = ml_collections.ConfigDict(read_config(CONFIG, []).to_dict())
        config.batch_size = batch_size
        config.model.name = name
        if k is not None:
            config.model.k = k
        shape = (SIZE, SIZE, 3)
        return lower_steps(config, devices, num_classes=CLASSES, image_shape=shape)["training"]
    mesh = data_mesh(devices)
    model = sc.create_model(name, k=k, dtype="bfloat16", rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(sc.fold_batch_norm(model))
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    prepare = functools.partial(normalize, mean=IMAGENET_MEAN, std=IMAGENET_STD)

    def forward(state, images):
        return nnx.merge(graphdef, state)(prepare(images))

    function = jax.jit(forward, in_shardings=(replicated(mesh), batch_sharded(mesh)))
    images = jax.ShapeDtypeStruct((batch_size, SIZE, SIZE, 3), jnp.uint8)
    return lowered(function, state, images)


def print_table(rows: Sequence[dict]) -> None:
    """Rows of one device, mode and batch size, with ratios to the baseline among them."""
    first = rows[0]
    print(f"\n{first['topology']}, {first['mode']}, {first['batch_size']} images, bfloat16")
    print(f"{'model':26} {'memory GiB':>10}   GFLOP       GB  kernels       ms  ratio")
    baseline = next((row["seconds"] for row in rows if row["model"] == BASELINE), None)
    for row in rows:
        if "refused" in row:
            print(f"{row['model']:26} does not fit: {row['refused']}")
            continue
        ratio = f"{row['seconds'] / baseline:6.2f}" if baseline else "     -"
        print(
            f"{row['model']:26} {row['temporary_bytes'] / 2**30:10.2f} {row['flops'] / 1e9:7,.0f} "
            f"{row['bytes_accessed'] / 1e9:8.2f} {row['kernels']:8,} {1e3 * row['seconds']:8.2f} "
            f"{ratio}"
        )


def print_parts(rows: Sequence[dict], bandwidth: float) -> None:
    """Of each part, its GB, the least ms that they need, and the estimated ms of each row."""
    names = dict.fromkeys(name for row in rows for name in row["parts"])
    models = "".join(f"{row['model']:>30}" for row in rows)
    print(f"\n{'part':16}{models}\n{'':16}" + len(rows) * f"{'GB':>10} {'least ms':>9} {'ms':>9}")
    for name in names:
        cells = ""
        for row in rows:
            part = row["parts"].get(name, {"bytes": 0, "estimated_seconds": 0})
            cells += f"{part['bytes'] / 1e9:10.2f} {1e3 * part['bytes'] / bandwidth:9.2f} "
            cells += f"{1e3 * part['estimated_seconds']:9.2f}"
        print(f"{name:16}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME@K", default=[PEER, BASELINE, "sc_resnet50@4/3"])
    add("--topologies", nargs="+", metavar="NAME", default=["v5e:1", "h100:1"])
    add("--modes", nargs="+", choices=["train", "inference"], default=["train", "inference"])
    add("--batch-size", type=int, metavar="N", default=64, help="on all devices (default: 64)")
    add("--parts", action="store_true", help="print the parts of each network, too")
    add("--json", type=Path, metavar="FILE", help="rows, read and written")
    args = parser.parse_args()
    check_outputs(args.json)
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    for topology in args.topologies:
        device, devices = get_devices(topology)
        for mode in args.modes:
            wanted = {"topology": topology, "mode": mode, "batch_size": args.batch_size}
            for model in args.models:
                key = wanted | {"model": model}
                if any(key.items() <= row.items() for row in rows):
                    continue
                with Status() as status:
                    status.update(f"compiling {model}, {mode}, for {topology}")
                    program = lower_model(model, mode, args.batch_size, devices)
                    try:
                        account = compile_account(program, device, len(devices))
                        row = dataclasses.asdict(account) | {"seconds": account.seconds}
                    except DoesNotFitError as error:
                        row = {"refused": str(error)}
                rows.append(key | row | {"jax": jax.__version__})
                if args.json:
                    write_json(args.json, rows)
            shown = [row for row in rows if wanted.items() <= row.items()]
            shown = [row for row in shown if row["model"] in args.models]
            print_table(shown)
            if args.parts:
                print_parts([row for row in shown if "refused" not in row], device.bandwidth)


if __name__ == "__main__":
    run_script(main)
