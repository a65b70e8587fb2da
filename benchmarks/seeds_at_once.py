"""How best to train the same small model with several seeds: three ways, in turns.

    python benchmarks/seeds_at_once.py [--model NAME@K] [--width N] [--seeds N] [--stem cifar] ...

One after the other, each with the whole machine; in processes at the same time, each with its share
of the CPU cores; or all in one program, by `vmap` over the seeds. Figures are training images a
second of all seeds together, in the steps alone, without compiling or reading data.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from scripts import core_shares, environment_apart, run_script

from slimconv_jax import create_model
from slimconv_jax.benchmark.measure import describe_environment
from slimconv_jax.devices import data_mesh, enable_compilation_cache
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.models.zoo import abstract_model, normalize_model, parse_model
from slimconv_jax.training.optimizer import create_optimizer
from slimconv_jax.training.step import create_state, make_train_step

SECONDS = 10
WAYS = {"one after the other": (1, False), "processes": (None, False), "vmap": (1, True)}
"""For each way, how many processes (None: as many as seeds), and whether by `vmap`."""


def work(args: argparse.Namespace) -> None:
    """Trains on random images for some seconds and prints the images a second."""
    enable_compilation_cache()
    name, k = parse_model(args.model)
    options = {"k": k, "width": args.width, "stem": args.stem, "num_classes": 100}
    model = create_model(name, dtype=args.dtype, **options, rngs=nnx.Rngs(0))
    schedule = optax.constant_schedule(1e-3)
    optimizer = create_optimizer(schedule, name="sgd", momentum=0.9, nesterov=True)
    step = make_train_step(
        model,
        optimizer,
        schedule,
        num_classes=100,
        augment=lambda key, images, targets: (images, targets),
        normalize=lambda images: images,
        key=jax.random.key(0),
        mesh=data_mesh(jax.devices()[:1]),
    )
    state = create_state(model, optimizer)
    images = jax.random.normal(jax.random.key(0), (args.batch_size, 32, 32, 3))
    batch = {"image": images, "label": jnp.zeros(args.batch_size, jnp.int32)}
    (shared,) = step.args
    function = step.func
    if args.vmap:
        function = jax.jit(jax.vmap(function, in_axes=(None, 0, None)), donate_argnums=1)
        state = jax.tree.map(lambda x: jnp.stack([x] * args.seeds), state)
    compiled = function.lower(shared, state, batch).compile()
    state, metrics = compiled(shared, state, batch)
    jax.block_until_ready(metrics)
    print("ready", flush=True)
    sys.stdin.readline()  # until all processes are
    start, steps = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < SECONDS:
        state, metrics = compiled(shared, state, batch)
        jax.block_until_ready(metrics)
        steps += 1
    print(steps * args.batch_size * (args.seeds if args.vmap else 1) / seconds)


def measure(count: int, vmap: bool) -> float:
    """Measures the images a second of `count` processes together."""
    command = [sys.executable, *sys.argv, "--worker", *(["--vmap"] if vmap else [])]
    environment = os.environ | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if count > 1 else {})
    workers = []
    for share in core_shares(count):
        pipe = subprocess.PIPE
        worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        if share:
            os.sched_setaffinity(worker.pid, share)
        workers.append(worker)
    try:
        for worker in workers:
            if worker.stdout.readline() != "ready\n":
                raise InputError("a process failed; what it said is above")
        for worker in workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        speeds = [worker.stdout.readline() for worker in workers]
        if not all(speeds):
            raise InputError("a process failed; what it said is above")
        return sum(map(float, speeds))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="sc_resnet50@4/3", metavar="NAME[@K]")
    add("--width", type=int, default=16, metavar="N")
    add("--stem", default="imagenet", choices=["imagenet", "cifar"], help="for 32x32 pixels")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--batch-size", type=int, default=128, metavar="N")
    add("--seeds", type=int, default=2, metavar="N", help="at once (default: 2)")
    add("--repeats", type=int, default=3, metavar="N")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--vmap", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("batch_size", "seeds", "repeats"):
        require_integer(name, getattr(args, name), 1)
    if args.worker:
        work(args)
        return
    args.model = normalize_model(args.model)
    name, k = parse_model(args.model)
    abstract_model(name, k=k, width=args.width, stem=args.stem)  # or one clear sentence
    print(describe_environment(environment_apart()))
    print(f"{args.model}, width {args.width}, batches of {args.batch_size}, {args.seeds} seeds")
    speeds = {way: [] for way in WAYS}
    for turn in range(args.repeats):
        for way, (count, vmap) in WAYS.items():
            speeds[way].append(measure(count or args.seeds, vmap))
            print(f"turn {turn + 1}: {way:20} {speeds[way][-1]:9,.0f} images/s", flush=True)
    first = statistics.median(speeds["one after the other"])
    for way, values in speeds.items():
        median = statistics.median(values)
        print(f"{way:20} {median:9,.0f} images/s  {median / first:.2f} x")


if __name__ == "__main__":
    run_script(main)
