"""Measures how fast the models run, here and in PyTorch, on the device at hand.

On a machine whose speed varies, two programs can be compared only if they take turns: every
comparison is one call of `take_turns`.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from slimconv_jax.benchmark.compiled_program import peak_bytes
from slimconv_jax.data.preprocessing import Preprocessing
from slimconv_jax.devices import data_mesh
from slimconv_jax.errors import InputError, exhausted, import_extra, require_integer
from slimconv_jax.inference.export import export_program, read_onnx
from slimconv_jax.inference.pieces import in_pieces
from slimconv_jax.models.complexity import count_macs
from slimconv_jax.models.resnet import ResNet
from slimconv_jax.models.surgery import fold_batch_norm
from slimconv_jax.models.zoo import abstract_model, create_model, normalize_model, parse_model
from slimconv_jax.torch_interop import import_torch
from slimconv_jax.training.optimizer import create_optimizer
from slimconv_jax.training.step import create_state, make_train_step

Rounds = Callable[[int], None]
"""Runs something the given number of times, and waits for the last result."""


class Program(NamedTuple):
    """A program to time.

    Attributes:
      run: runs the given number of rounds and waits for the last.
      compile_seconds: None if nothing was compiled.
      memory: bytes that it needs at once, or None if unknown.
    """

    run: Rounds
    compile_seconds: float | None = None
    memory: int | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to measure, as its user describes it.

    Attributes:
      model: NAME or NAME@K, such as "sc_resnet50@8/3".
      mode: "inference": evaluation mode, in JAX with batch norm folded. "train": forward, backward,
        and SGD with Nesterov momentum and weight decay.
      batch_size: images per batch.
      image_size: their height and width.
      dtype: "float32" or "bfloat16", of the computation; parameters are float32.
      implementation: "jax", "torch", "torch.compile", or "onnxruntime" for what `export` writes.
    """

    model: str
    mode: str
    batch_size: int
    image_size: int
    dtype: str
    implementation: str


def _model_options(model: str) -> dict:
    return dict(zip(("name", "k"), parse_model(model), strict=True))


def _images(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images (N, H, W, 3), float32, and labels."""
    rng = np.random.default_rng(0)
    shape = (case.batch_size, case.image_size, case.image_size, 3)
    return rng.standard_normal(shape, np.float32), rng.integers(1000, size=case.batch_size)


def require_onnxruntime(modes: Sequence[str], dtypes: Sequence[str]) -> None:
    """Raises an InputError if onnxruntime cannot be measured here."""
    if jax.default_backend() != "cpu":
        raise InputError("onnxruntime is measured on CPUs only")
    if "train" in modes or set(dtypes) != {"float32"}:
        raise InputError("onnxruntime is for --mode inference and --dtype float32")
    for package in ("onnxruntime", "jax2onnx"):
        import_extra(package, extra="export")


def require_torch() -> None:
    """Raises an InputError if PyTorch is not installed, or cannot use the device of JAX."""
    torch, backend = import_torch(), jax.default_backend()
    if backend != "cpu" and not (backend == "gpu" and torch.cuda.is_available()):
        raise InputError(
            f"PyTorch as it is installed here cannot use the {backend.upper()} that JAX uses"
        )


def build(case: Case) -> Program:
    """Builds and compiles the program of a case, with random weights and images on the device.

    Raises:
      ValueError: if it does not fit into memory, or `torch.compile` does not work here.
    """
    programs = {"jax": _jax_program, "onnxruntime": _onnxruntime_program}
    try:
        program = programs.get(case.implementation, _torch_program)(case)
        program.run(1)
    except (MemoryError, OSError, RuntimeError) as error:  # of XLA, CUDA, or torch.compile
        reason = str(error).strip().split("\n")[0]
        if exhausted(error):
            raise InputError(
                f"{case.model} at batch size {case.batch_size} does not fit into memory: {reason}"
            ) from error
        if case.implementation == "torch.compile":
            raise InputError(f"torch.compile does not work here: {reason}") from error
        raise
    return program


def _jax_program(case: Case) -> Program:
    dtype = None if case.dtype == "float32" else case.dtype
    model = create_model(**_model_options(case.model), dtype=dtype, rngs=nnx.Rngs(0))
    images, labels = (jnp.asarray(array) for array in _images(case))
    if case.mode == "train":
        return train_program(model, images, labels)
    return inference_program(model, images)


def _torch_program(case: Case) -> Program:
    from slimconv_jax.torch_interop.timing import torch_program

    run, compile_seconds, memory = torch_program(
        abstract_model(**_model_options(case.model)).config,
        *_images(case),
        mode=case.mode,
        dtype=case.dtype,
        compiled=case.implementation == "torch.compile",
        device="cuda" if jax.default_backend() == "gpu" else "cpu",
    )
    return Program(run, compile_seconds, memory)


def _onnxruntime_program(case: Case) -> Program:
    """Builds the program that `export --format onnx` writes, with the logits of the model."""
    model = create_model(**_model_options(case.model), rngs=nnx.Rngs(0))
    model.eval()
    images, _ = _images(case)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        preprocessing = Preprocessing(image_size=case.image_size)
        export_program(model, path, format="onnx", preprocessing=preprocessing)
        return Program(repeated(read_onnx(path), images))


def inference_program(model: ResNet, images: jax.Array) -> Program:
    """Builds the program that `predict` runs, of a model with its batch norm folded."""
    model.eval()
    graphdef, state = nnx.split(fold_batch_norm(model))
    mesh = data_mesh(jax.devices()[:1])

    @jax.jit
    def forward(state: nnx.State, images: jax.Array) -> jax.Array:
        return in_pieces(nnx.merge(graphdef, state), images, mesh=mesh)

    compiled, seconds, memory = _compile(forward, state, images)
    return Program(repeated(compiled, state, images), seconds, memory)


def _compile(function: Callable, *args) -> tuple[Callable, float, int]:
    """Compiles a jitted function; returns the program, the seconds taken, and the bytes needed."""
    start = time.perf_counter()
    compiled = function.lower(*args).compile()
    seconds = time.perf_counter() - start
    return compiled, seconds, peak_bytes(compiled)


def train_program(model: ResNet, images: jax.Array, labels: jax.Array) -> Program:
    """Builds the program of a training step on float images, always the same ones."""
    schedule = optax.constant_schedule(1e-3)
    optimizer = create_optimizer(
        schedule, name="sgd", momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    step = make_train_step(
        model,
        optimizer,
        schedule,
        num_classes=model.config.num_classes,
        augment=lambda key, images, targets: (images, targets),
        normalize=lambda images: images,
        key=jax.random.key(0),
        mesh=data_mesh(jax.devices()[:1]),
    )
    state = create_state(model, optimizer)
    batch = {"image": images, "label": labels}
    (shared,) = step.args
    compiled, seconds, memory = _compile(step.func, shared, state, batch)

    def train_step() -> dict[str, jax.Array]:
        nonlocal state
        state, metrics = compiled(shared, state, batch)
        return metrics

    return Program(repeated(train_step), seconds, memory)


def take_turns(
    programs: Sequence[Rounds], *, repeats: int, seconds: float = 0.2
) -> list[list[float]]:
    """Measures the seconds that a round of each program takes, `repeats` times, in turns.

    A turn begins with a round that is not measured: threads of the program before may still spin,
    and caches hold its data. Then come as many rounds as take `seconds`, at least one.

    Returns:
      The seconds of each turn, for each program.
    """

    def timed(run: Rounds, rounds: int) -> float:
        run(1)
        start = time.perf_counter()
        run(rounds)
        return (time.perf_counter() - start) / rounds

    counts = [max(round(seconds / timed(run, 1)), 1) for run in programs]
    turns = [list(map(timed, programs, counts)) for _ in range(repeats)]
    return [list(times) for times in zip(*turns, strict=True)]


def repeated(function: Callable, *args) -> Rounds:
    """Returns the rounds of a compiled function of arrays."""

    def run(rounds: int) -> None:
        for _ in range(rounds):
            output = function(*args)
        jax.block_until_ready(output)

    return run


def matmul_rounds(dtype: str) -> tuple[int, Rounds]:
    """Returns the FLOPs of a large square matrix product and its rounds, to take turns with others.

    The product has JAX's default precision, which on recent GPUs is TF32 for float32.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return 2 * size**3, repeated(jax.jit(jnp.matmul), square, square)


def describe_device() -> str:
    """Describes the device that JAX computes on, in words."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    available = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    return f"{names[0] if names else platform.machine()}, {len(available)} cores"


def plan(
    models: Sequence[str],
    *,
    modes: Sequence[str],
    batch_sizes: Sequence[int],
    image_size: int,
    dtypes: Sequence[str],
    implementations: Sequence[str],
) -> list[list[Case]]:
    """Returns the cases in groups that take turns: only model and implementation differ in a group.

    Raises:
      ValueError: if a model is unknown or a number is too small.
    """
    for name, values in (("batch size", batch_sizes), ("image size", [image_size])):
        for value in values:
            require_integer(f"the {name}", value, 1)
    names = list(dict.fromkeys(map(normalize_model, models)))
    return [
        [
            Case(model, mode, batch_size, image_size, dtype, implementation)
            for model in names
            for implementation in dict.fromkeys(implementations)
        ]
        for mode, dtype, batch_size in itertools.product(
            *map(dict.fromkeys, (modes, dtypes, batch_sizes))
        )
    ]


def measure(
    cases: Sequence[Case],
    *,
    repeats: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Builds the programs of one group and lets them take turns.

    Args:
      cases: of equal mode, batch size and dtype.
      repeats: turns.
      progress: called with a description of each step.

    Returns:
      For each case its fields, and: `images_per_second` (median), `fastest` and `slowest` turn in
      images per second, `compile_seconds` (tracing included) and `memory_bytes` (or None),
      `flops_per_second` (two for each multiply-add, in training three times those of the forward
      pass), `peak`, the FLOP/s of a large matrix product at its fastest turn, and `peak_share`,
      `flops_per_second` as a fraction of `peak`.
    """
    programs = []
    for number, case in enumerate(cases, 1):
        progress(f"building {number} of {len(cases)}: {case.model} in {case.implementation}")
        programs.append(build(case))
    progress(f"measuring {len(cases)} programs in {repeats} turns")
    product_flops, product = matmul_rounds(cases[0].dtype)
    *times, product_times = take_turns(
        [*(program.run for program in programs), product], repeats=repeats
    )
    peak = product_flops / min(product_times)
    rows = []
    for case, program, measured in zip(cases, programs, times, strict=True):
        median = statistics.median(measured)
        macs = count_macs(abstract_model(**_model_options(case.model)), case.image_size)
        flops = 2 * macs * (3 if case.mode == "train" else 1) * case.batch_size / median
        rows.append(
            dataclasses.asdict(case)
            | {
                "images_per_second": case.batch_size / median,
                "slowest": case.batch_size / max(measured),
                "fastest": case.batch_size / min(measured),
                "compile_seconds": program.compile_seconds,
                "memory_bytes": program.memory,
                "flops_per_second": flops,
                "peak": peak,
                "peak_share": flops / peak,
            }
        )
    return rows


def environment() -> dict:
    """Returns the date, the device, and the versions of the packages that figures depend on."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "torch", "onnxruntime", "jax2onnx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"date": now, "device": describe_device(), "versions": versions}


def describe_environment(where: dict) -> str:
    """Returns the result of `environment` as one line."""
    packages = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['date']}; {where['device']}; {packages}"
