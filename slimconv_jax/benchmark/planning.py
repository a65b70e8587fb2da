"""What a training run needs on TPUs and GPUs that are not here, according to their compilers.

Both compilers run on an ordinary machine. The figures are counted (bytes, FLOPs, kernels,
collectives) or, on TPUs, estimated (cycles of each operation); nothing here is measured.
"""

import collections
import dataclasses
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.experimental import topologies

from slimconv_jax.benchmark import compiled_program
from slimconv_jax.devices import data_mesh
from slimconv_jax.errors import InputError, import_extra
from slimconv_jax.inference.eval_step import TOTALS, make_eval_step
from slimconv_jax.models.complexity import count_program_macs
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.training.config import check_config
from slimconv_jax.training.setup import create_normalize, create_step, uses_ema
from slimconv_jax.training.step import abstract_state
from slimconv_jax.training.timetable import create_timetable


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of accelerator, as its maker describes it.

    Attributes:
      name: its name in topologies.
      memory: bytes.
      bandwidth: of the memory, bytes per second.
      flops: of matrix products in bfloat16, FLOP/s.
      clock: Hz; for TPUs, the clock at which their units reach `flops`.
      source: where the figures are from.
      gpu: fields of XLA's description of a GPU; None for TPUs.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    clock: float
    source: str
    gpu: dict[str, Any] | None = None


_GPU_COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
_A100 = _GPU_COMMON | {
    "shared_memory_per_core": 167936,
    "shared_memory_per_block_optin": 166912,
    "core_count": 108,
    "fpus_per_core": 64,
    "l2_cache_size": 41_943_040,
    "cuda_compute_capability": "{ major: 8 minor: 0 }",
}
_H100 = _GPU_COMMON | {
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "core_count": 132,
    "fpus_per_core": 128,
    "l2_cache_size": 52_428_800,
    "cuda_compute_capability": "{ major: 9 feature_extension: ACCELERATED_FEATURES }",
}

_TPU = "Cloud TPU documentation, system architecture, TPU"
_SXM = "SXM data sheet; memory and clock as XLA describes it"

DEVICES = {
    device.name: device
    for device in (
        Device("v5e", 16 * 2**30, 819e9, 197e12, 1.5e9, f"{_TPU} v5e"),
        Device("v5p", 95 * 2**30, 2765e9, 459e12, 1.75e9, f"{_TPU} v5p"),
        Device("v6e", 32 * 2**30, 1640e9, 918e12, 1.75e9, f"{_TPU} v6e"),
        Device("a100", 85_100_068_864, 2039e9, 312e12, 1.41e9, f"NVIDIA A100 80 GB {_SXM}", _A100),
        Device("h100", 84_942_979_072, 3350e9, 989e12, 1.98e9, f"NVIDIA H100 {_SXM}", _H100),
    )
}
"""The accelerators that programs can be compiled for here."""

TOPOLOGIES = (
    "v5e:1 or v5e:4x4 (v6e alike), v5p:1 or v5p:2x2x2 for TPU slices (of whole hosts, that is "
    "of 2x2 chips each), h100:8 or a100:8 for the GPUs of a host, h100:2x8 for those of two"
)
"""The topologies that can be planned for, in words."""


def get_devices(topology: str) -> tuple[Device, list]:
    """Describes devices that need not be here, for `data_mesh`.

    Args:
      topology: such as "v5e:4x4"; see `TOPOLOGIES`.

    Raises:
      ValueError: if there is no such topology, or its compiler is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not match or match[1] not in DEVICES:
        raise InputError(f"there is no topology {topology!r}; there are {TOPOLOGIES}")
    device, sizes = DEVICES[match[1]], [int(size) for size in match[2].split("x")]
    if platform.machine().lower() not in ("x86_64", "amd64") or platform.system() != "Linux":
        raise InputError(
            f"the compilers for TPUs and GPUs run on Linux with an x86-64 processor, and this is "
            f"{platform.system()} on {platform.machine()}"
        )
    # Leaves the devices of this machine to others.
    jax.config.update("jax_platforms", "cpu")
    describe = _describe_tpus if device.gpu is None else _describe_gpus
    arguments = describe(device, sizes)
    try:
        described = topologies.get_topology_desc(**arguments)
    except (RuntimeError, ValueError) as error:  # of the compiler, about the topology
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"there is no topology {topology!r} ({reason}); there are {TOPOLOGIES}"
        ) from None
    return device, list(described.devices)[: math.prod(sizes)]


def _describe_tpus(device: Device, sizes: list[int]) -> dict[str, str]:
    """Returns the arguments of `get_topology_desc` for a slice with at least these chips."""
    axes = 3 if device.name == "v5p" else 2
    name = f"{device.name}:{'x'.join(map(str, sizes))}"
    if len(sizes) not in (1, axes) or (axes == 2 and max(sizes) > 16):
        raise InputError(f"there is no topology {name}; there are {TOPOLOGIES}")
    import_extra("libtpu", extra="plan")
    # Keeps the library from looking for a TPU, or for another program that uses one.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    if math.prod(sizes) == 1:  # one chip of the smallest slice that has a name
        name = f"{device.name}:{'2x2' if axes == 2 else '2x2x1'}"
    return {"topology_name": name, "platform": "tpu"}


def _describe_gpus(device: Device, sizes: list[int]) -> dict[str, str]:
    """Returns the arguments of `get_topology_desc` for hosts of GPUs."""
    if len(sizes) > 2 or 0 in sizes:
        raise InputError(
            f"give the GPUs of one host, or hosts and the GPUs of each, as in {device.name}:2x8"
        )
    try:
        import_extra("jax_plugins.xla_cuda13", extra="plan")
    except InputError:
        import_extra("jax_plugins.xla_cuda12", extra="plan", package="jax-cuda12-plugin")
    jax.devices()  # registers the plugin
    hosts, count = sizes if len(sizes) == 2 else (1, *sizes)
    info = device.gpu | {
        "clock_rate_ghz": device.clock / 1e9,
        "memory_bandwidth": int(device.bandwidth),
        "device_memory_size": device.memory,
    }
    fields = "".join(f"  {name}: {value}\n" for name, value in info.items())
    target = (
        f"gpu_device_info {{\n{fields}}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 patch: 0 }\n"
        f'device_description_str: "{device.name}"\n'
    )
    return {"platform": "cuda", "target_config": target, "topology": f"1x{hosts}x{count}"}


GPU_OPTIONS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "False"}
"""Autotuning needs a device, and Triton's matrix products need autotuning."""


class Lowered(NamedTuple):
    """A program to compile.

    Attributes:
      lowered: from `jax.jit(...).lower`.
      macs: its multiply-adds on all devices together.
    """

    lowered: jax.stages.Lowered
    macs: int


STEPS = ("training", "evaluation")


def lower_steps(
    config: ml_collections.ConfigDict,
    devices: list,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
) -> dict[str, Lowered]:
    """Lowers the `STEPS` of a run, as `train` would run them.

    Args:
      config: of the run.
      devices: what it would run on.
      num_classes: of its data.
      image_shape: (H, W, 3) of the images of a batch of training.

    Raises:
      ValueError: if the config cannot be used, or its batch does not divide over the devices.
    """
    mesh = data_mesh(devices)
    check_config(config, mesh.size)
    model = abstract_model(num_classes=num_classes, **config.model)
    # The length of the run does not change the size of the schedule in the program.
    timetable = create_timetable(config, 10**4 * config.batch_size)
    optimizer, train_step = create_step(config, model, timetable=timetable, mesh=mesh)
    state = abstract_state(model, optimizer, ema=uses_ema(config))

    def batch(size: int, shape: tuple, **more: Any) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "image": jax.ShapeDtypeStruct((size, *shape), jnp.uint8),
            "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        } | {name: jax.ShapeDtypeStruct((size,), dtype) for name, dtype in more.items()}

    test_size = config.transform.test_size
    test_shape = (test_size, test_size, 3) if test_size else image_shape
    eval_size = math.ceil(config.eval_batch_size / mesh.size) * mesh.size
    eval_step = make_eval_step(model, normalize=create_normalize(config), mesh=mesh)
    totals = {name: jax.ShapeDtypeStruct((), dtype) for name, dtype in TOTALS.items()}
    traced = (
        train_step.func.trace(*train_step.args, state, batch(config.batch_size, image_shape)),
        eval_step.trace(totals, state.variables, batch(eval_size, test_shape, mask=bool)),
    )
    return {
        name: Lowered(t.lower(), count_program_macs(t.jaxpr.jaxpr))
        for name, t in zip(STEPS, traced, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class Account:
    """The resources that a program needs, per device; none of them is measured.

    Attributes:
      argument_bytes: of its arguments, state and batch.
      temporary_bytes: of its temporaries.
      peak_bytes: of everything in memory at once.
      device_bytes: memory of the device.
      flops: counted in the program: two for each multiply-add.
      bytes_accessed: of the operands and results of all operations, less what stays on the chip.
      flops_seconds: lower bound of the time for the FLOPs.
      bytes_seconds: lower bound of the time for the bytes.
      estimated_seconds: the compiler's estimate (TPU), or None.
      kernels: operations that the device executes in order.
      parts: of each of `compiled_program.PARTS`, its bytes and the estimate (TPU, in seconds).
      collectives: how many of each kind.
      collective_bytes: of their results.
      compile_seconds: on this machine.
    """

    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    device_bytes: int
    flops: float
    bytes_accessed: int
    flops_seconds: float
    bytes_seconds: float
    estimated_seconds: float | None
    kernels: int
    parts: dict[str, dict[str, float]]
    collectives: dict[str, int]
    collective_bytes: int
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the program fits into the memory of the device."""
        return self.peak_bytes <= self.device_bytes

    @property
    def shares(self) -> dict[str, float]:
        """The share of each part in the estimate (TPU) or in the bytes (GPU)."""
        key = "bytes" if self.estimated_seconds is None else "estimated_seconds"
        whole = sum(part[key] for part in self.parts.values()) or 1
        return {name: part[key] / whole for name, part in self.parts.items()}

    @property
    def seconds(self) -> float:
        """The compiler's estimate, or the lower bound of the time for FLOPs and bytes."""
        return self.estimated_seconds or max(self.flops_seconds, self.bytes_seconds)


class DoesNotFitError(Exception):
    """The compiler refuses a program that needs more memory than the device has."""


def compile_account(program: Lowered, device: Device, num_devices: int) -> Account:
    """Compiles a program and reads off its needs.

    Raises:
      DoesNotFitError: if the compiler reports that it does not fit.
    """
    options = None if device.gpu is None else GPU_OPTIONS
    start = time.perf_counter()
    try:
        compiled = program.lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used \S+ of \S+ \w+", str(error))
        raise DoesNotFitError(used[0] if used else "") from None
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    operations = list(compiled_program.operations_of(text))
    bytes_accessed = sum(operation.bytes for operation in operations)
    cycles = sum(operation.cycles for operation in operations)
    collectives = list(compiled_program.collectives_of(text))
    flops = 2 * program.macs / num_devices
    return Account(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=compiled_program.peak_bytes(compiled),
        device_bytes=device.memory,
        flops=flops,
        bytes_accessed=bytes_accessed,
        flops_seconds=flops / device.flops,
        bytes_seconds=bytes_accessed / device.bandwidth,
        estimated_seconds=cycles / device.clock if device.gpu is None else None,
        kernels=len(operations),
        parts=compiled_program.parts_of(operations, device.clock),
        collectives=dict(collections.Counter(kind for kind, _ in collectives)),
        collective_bytes=sum(size for _, size in collectives),
        compile_seconds=seconds,
    )


def find_fit(
    config: ml_collections.ConfigDict,
    fits: Callable[[ml_collections.ConfigDict], bool],
    multiple: int,
) -> Iterator[tuple[str, bool]]:
    """Tries changes that may help a run that does not fit, each by itself.

    Args:
      config: of the run.
      fits: returns whether a config fits.
      multiple: each part of the batch must be a multiple of this.

    Yields:
      A change as a command-line option, and whether the run then fits: blocks computed twice, the
      batch in parts (the fewest that fit), and smaller batches, until the largest that fits is
      known to an eighth of the batch.
    """

    def attempt(name: str, value: Any) -> tuple[str, bool]:
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed.update_from_flattened_dict({name: value})
        return f"--config.{name}={value}", fits(changed)

    if not config.model.get("remat", False):
        yield attempt("model.remat", True)
    parts = 2 * config.step.get("accumulation_steps", 1)
    while config.batch_size % (multiple * parts) == 0:
        yield (found := attempt("step.accumulation_steps", parts))
        if found[1]:
            break
        parts *= 2
    multiple *= config.step.get("accumulation_steps", 1)
    fitting, refused = 0, config.batch_size
    while refused - fitting > max(config.batch_size // 8, multiple):
        size = max((fitting + refused) // 2 // multiple, 1) * multiple
        yield (found := attempt("batch_size", size))
        fitting, refused = (size, refused) if found[1] else (fitting, size)
