"""Where the time of a network goes, and how much of it the device could not do without.

    python benchmarks/cost_account.py [--model NAME] [--mode train] [--batch-size N] ...

Every part of the network is compiled alone and measured on arrays of its shapes. Its floor is what
its multiply-adds take at the speed of a large matrix product, or what moving its arrays once takes
at the speed of a large addition, whichever is longer. The gap is what is above the floor. The
parts take turns with the whole program, which is faster than their sum where XLA fuses across
parts, and slower where arrays no longer fit into the caches.
"""

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scripts import run_script

import slimconv_jax as sc
from slimconv_jax.benchmark.measure import (
    Rounds,
    describe_environment,
    environment,
    inference_program,
    matmul_rounds,
    repeated,
    take_turns,
    train_program,
)
from slimconv_jax.data.preprocessing import normalize
from slimconv_jax.errors import require_integer
from slimconv_jax.inference.pieces import PIXELS
from slimconv_jax.models.operations import max_pool
from slimconv_jax.models.slimconv import Gate, SlimConv
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.training.optimizer import create_optimizer

GATE, UPPER, LOWER = "gate, fold, concatenate", "upper convolutions", "lower convolutions"
POINTWISE, OTHER = "1x1 convolutions", "stem, pool, head"
NORM, OPTIMIZER, INPUT = "batch norm, ReLU, sums", "optimiser", "input"


class Part(NamedTuple):
    """One part of a network: `function(params, *inputs)`, and what its arguments are like."""

    group: str
    function: Callable
    params: Any
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    macs: int
    backward: str  # "params and inputs", "params" (of images nobody needs the gradient), or ""


class Account:
    """Collects the parts of a network while shapes go through it."""

    def __init__(self, train: bool):
        self.train = train
        self.parts: list[Part] = []

    def add(self, group: str, call: Callable, module: Any, *inputs, first: bool = False) -> Any:
        """Appends `call(module, *inputs)`; returns the shapes of its results."""
        graphdef, *states = nnx.split(module, nnx.Param, ...)
        params, rest = map(nnx.to_pure_dict, states)

        def function(params, *inputs):
            return call(nnx.merge(graphdef, params, rest), *inputs)

        macs = 0
        counted = module.gate if isinstance(module, SlimConv) else module
        if isinstance(counted, nnx.Conv | nnx.Linear | Gate):
            macs = inputs[0].shape[0] * sc.count_macs(counted, inputs[0].shape[1:])
        backward = ("params" if first else "params and inputs") if self.train else ""
        self.parts.append(Part(group, function, params, inputs, macs, backward))
        return jax.eval_shape(function, params, *inputs)

    def conv_bn(self, group: str, module: nnx.Module, x, *, relu: bool, first: bool = False):
        """A ConvBN, or what `fold_batch_norm` has left of it, and the ReLU after it."""
        folded = isinstance(module, nnx.Conv)
        call = type(module).__call__ if folded else nnx.Conv.__call__
        x = self.add(group, call, module if folded else module.conv, x, first=first)
        if not folded:
            norm = type(module.bn).__call__
            call = (lambda bn, x: nnx.relu(norm(bn, x))) if relu else norm
            x = self.add(NORM, call, module.bn, x)
        elif relu:
            x = self.add(NORM, lambda _, x: nnx.relu(x), nnx.Dict(), x)
        return x

    def network(self, model: nnx.Module, x: jax.ShapeDtypeStruct) -> None:
        """All parts of a ResNet for normalised images of the shape of `x`."""
        x = self.conv_bn(OTHER, model.stem, x, relu=True, first=True)
        x = self.add(OTHER, lambda _, x: max_pool(x), nnx.Dict(), x)
        for block in (block for stage in model.stages for block in stage):
            y = self.conv_bn(POINTWISE, block.conv1, x, relu=True)
            if isinstance(block.conv2, SlimConv):
                unit = block.conv2
                upper, lower = self.add(GATE, SlimConv.reconstruct, unit, y)
                upper = self.conv_bn(UPPER, unit.upper, upper, relu=False)
                lower = self.conv_bn(LOWER, unit.lower_reduce, lower, relu=True)
                lower = self.conv_bn(LOWER, unit.lower, lower, relu=False)
                concatenate = lambda _, *xs: nnx.relu(jnp.concatenate(xs, axis=-1))  # noqa: E731
                y = self.add(GATE, concatenate, nnx.Dict(), upper, lower)
            else:
                y = self.conv_bn("3x3 convolutions", block.conv2, y, relu=True)
            y = self.conv_bn(POINTWISE, block.conv3, y, relu=False)
            if block.shortcut is not None:
                x = self.conv_bn(POINTWISE, block.shortcut, x, relu=False)
            x = self.add(NORM, lambda _, x, y: nnx.relu(x + y), nnx.Dict(), x, y)
        x = self.add(OTHER, lambda _, x: x.mean((1, 2), keepdims=True), nnx.Dict(), x)
        self.add(OTHER, type(model.classifier).__call__, model.classifier, x)

    def rest(self, model: nnx.Module, images: jax.ShapeDtypeStruct) -> None:
        """What a training run does besides: the images made ready, the parameters updated."""
        pixels = jax.ShapeDtypeStruct(images.shape, jnp.uint8)
        prepare = functools.partial(normalize, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        self.parts.append(Part(INPUT, lambda _, x: prepare(x), {}, (pixels,), 0, ""))
        optimizer = create_optimizer(
            optax.constant_schedule(0.1),
            name="sgd",
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-4,
        )
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        state = jax.eval_shape(optimizer.init, params)

        def update(params, grads, state):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.parts.append(Part(OPTIMIZER, update, params, (params, state), 0, ""))


def copy_rounds() -> tuple[int, Rounds]:
    """Returns the bytes that `x + 1` moves for an array too large for the caches, and its rounds.

    The result reuses the memory of the argument, as within a larger program.
    """
    size = 2**26 if jax.default_backend() == "cpu" else 2**29
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(size, jnp.float32)

    def step() -> jax.Array:
        nonlocal x
        x = add_one(x)
        return x

    return 2 * x.nbytes, repeated(step)


def size_of(tree: Any) -> int:
    """Bytes of all arrays, or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def random_like(tree: Any) -> Any:
    """Random arrays of the same shapes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.abs(rng.standard_normal(leaf.shape)), leaf.dtype), tree
    )


def prepared(part: Part) -> tuple[str, Callable, float, float]:
    """The text of a part's program, the program, its FLOPs and the bytes that it has to move."""
    outputs = jax.eval_shape(part.function, part.params, *part.inputs)
    flops, size = 2 * part.macs, size_of((part.params, part.inputs, outputs))
    if not part.backward:
        arguments = part.params, *part.inputs
        text = str(jax.make_jaxpr(part.function)(*arguments))
        return text, lambda: repeated(jax.jit(part.function), *random_like(arguments)), flops, size
    wanted = (part.params, *part.inputs) if "inputs" in part.backward else (part.params,)

    def both(cotangents, params, *inputs):
        if "inputs" in part.backward:
            results, vjp = jax.vjp(part.function, params, *inputs)
        else:
            results, vjp = jax.vjp(lambda params: part.function(params, *inputs), params)
        return results, vjp(cotangents)

    arguments = outputs, part.params, *part.inputs
    text = str(jax.make_jaxpr(both)(*arguments))
    flops *= 3 if "inputs" in part.backward else 2
    # Backward: what was read, and the gradient of the results, in; the gradients of it out.
    size += size_of((part.params, part.inputs, outputs)) + size_of(wanted)
    return text, lambda: repeated(jax.jit(both), *random_like(arguments)), flops, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="sc_resnet50")
    parser.add_argument("--k", help="compression ratio, such as 8/3")
    parser.add_argument("--mode", choices=["inference", "train"], default="train")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--image-size", type=int, default=64, metavar="N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    args = parser.parse_args()
    for name in ("batch_size", "image_size", "repeats"):
        require_integer(name, getattr(args, name), 1)
    train = args.mode == "train"
    if not train and args.batch_size * args.image_size**2 > PIXELS:
        parser.error(
            f"in inference at most {PIXELS // args.image_size**2 or 1} images of this size go "
            "through a network at once; choose a smaller --batch-size"
        )
    block = abstract_model(args.model, k=args.k).config.block
    if block != "bottleneck":
        parser.error(f"{args.model} has {block} blocks; the account knows bottlenecks only")
    print(describe_environment(environment()))
    print(
        f"{args.model}, {args.mode}, {args.dtype}, {args.batch_size} images of "
        f"{args.image_size}x{args.image_size}",
        flush=True,
    )
    dtype = None if args.dtype == "float32" else args.dtype
    model = sc.create_model(args.model, k=args.k, dtype=dtype, rngs=nnx.Rngs(0))
    shape = (args.batch_size, args.image_size, args.image_size, 3)
    account = Account(train)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    if train:
        whole = train_program(model, jnp.zeros(shape), jnp.zeros(shape[0], jnp.int32))
        account.network(model, images)
        account.rest(model, images)
    else:
        whole = inference_program(model, jnp.zeros(shape))
        account.network(sc.fold_batch_norm(model), images)
    programs: dict[str, Callable] = {}
    entries = []
    for part in account.parts:
        text, make, flops, size = prepared(part)
        text = part.group + text
        if text not in programs:  # blocks repeat
            programs[text] = make()
        entries.append((part.group, text, flops, size))
    print(f"{len(entries)} parts, {len(programs)} of them different; measuring", flush=True)
    product_flops, product = matmul_rounds(args.dtype)
    copied_bytes, copy = copy_rounds()
    *times, product_times, copy_times = take_turns(
        [*programs.values(), whole.run, product, copy], repeats=args.repeats, seconds=0.02
    )
    flops_peak, bytes_peak = product_flops / min(product_times), copied_bytes / min(copy_times)
    print(f"peaks: {flops_peak / 1e9:,.0f} GFLOP/s, {bytes_peak / 1e9:,.1f} GB/s")
    *medians, whole_seconds = map(statistics.median, times)
    seconds = dict(zip(programs, medians, strict=True))

    print(f"{'':26} {'parts':>5} {'GFLOP':>7} {'MB':>7} {'floor':>9} {'measured':>9} {'gap':>9}")
    total = np.zeros(6)
    for group in dict.fromkeys(entry[0] for entry in entries):
        figures = np.zeros(6)
        for _, text, flops, size in (entry for entry in entries if entry[0] == group):
            floor = max(flops / flops_peak, size / bytes_peak)
            time = seconds[text]
            figures += [1, flops / 1e9, size / 1e6, 1e3 * floor, 1e3 * time, 1e3 * (time - floor)]
        total += figures
        print(line(group, figures))
    print(line("sum", total))
    print(f"the whole, compiled as one program: {1e3 * whole_seconds:.1f} ms")


def line(name: str, figures: np.ndarray) -> str:
    parts, flops, size, floor, measured, gap = figures
    return (
        f"{name:26} {parts:5.0f} {flops:7.2f} {size:7.0f} {floor:6.1f} ms {measured:6.1f} ms "
        f"{gap:6.1f} ms"
    )


if __name__ == "__main__":
    run_script(main)
