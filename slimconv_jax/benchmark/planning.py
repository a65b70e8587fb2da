"""What a training run needs on TPUs and GPUs that are not here, as their compilers tell.

Both compilers run on an ordinary machine. What they give is counted (bytes, FLOPs, kernels,
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

from slimconv_jax.benchmark.compiled_program import collectives_of, operations_of, parts_of
from slimconv_jax.devices import data_mesh
from slimconv_jax.errors import InputError, import_extra
from slimconv_jax.inference.eval_step import TOTALS, make_eval_step
from slimconv_jax.models.complexity import count_program_macs
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.training.config import check_config
from slimconv_jax.training.setup import create_normalize, create_step, uses_ema
from slimconv_jax.training.step import abstract_state


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of accelerator, as its makers describe it.

    Attributes:
      name: as topologies name it.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      flops: of matrix products in bfloat16, FLOP/s.
      clock: Hz. Of TPUs the one at which their units give `flops`.
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

_CLOUD_TPU = "Cloud TPU documentation, system architecture"

DEVICES = {
    device.name: device
    for device in (
        Device("v5e", 16 * 2**30, 819e9, 197e12, 1.5e9, f"{_CLOUD_TPU}, TPU v5e"),
        Device("v5p", 95 * 2**30, 2765e9, 459e12, 1.75e9, f"{_CLOUD_TPU}, TPU v5p"),
        Device("v6e", 32 * 2**30, 1640e9, 918e12, 1.75e9, f"{_CLOUD_TPU}, TPU v6e"),
        Device(
            "a100",
            85_100_068_864,
            2039e9,
            312e12,
            1.41e9,
            "NVIDIA A100 data sheet, SXM 80 GB; memory and clock as XLA describes it",
            _GPU_COMMON
            | {
                "shared_memory_per_core": 167936,
                "shared_memory_per_block_optin": 166912,
                "core_count": 108,
                "fpus_per_core": 64,
                "l2_cache_size": 41_943_040,
                "cuda_compute_capability": "{ major: 8 minor: 0 }",
            },
        ),
        Device(
            "h100",
            84_942_979_072,
            3350e9,
            989e12,
            1.98e9,
            "NVIDIA H100 data sheet, SXM; memory and clock as XLA describes it",
            _GPU_COMMON
            | {
                "shared_memory_per_core": 233472,
                "shared_memory_per_block_optin": 232448,
                "core_count": 132,
                "fpus_per_core": 128,
                "l2_cache_size": 52_428_800,
                "cuda_compute_capability": "{ major: 9 feature_extension: ACCELERATED_FEATURES }",
            },
        ),
    )
}
"""The accelerators that programs can be compiled for here."""


def describe_topologies() -> str:
    """What may be asked for, in words."""
    return (
        "v5e:1 or v5e:4x4 (v6e alike), v5p:1 or v5p:2x2x2 for TPU slices (of whole hosts, that is "
        "of 2x2 chips each), h100:8 or a100:8 for the GPUs of a host, h100:2x8 for those of two"
    )


def get_devices(topology: str) -> tuple[Device, list]:
    """Descriptions of devices that need not be here, for `data_mesh`.

    Args:
      topology: such as "v5e:4x4"; see `describe_topologies`.

    Raises:
      ValueError: if there is no such topology, or its compiler is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not match or match[1] not in DEVICES:
        raise InputError(f"there is no topology {topology!r}; there are {describe_topologies()}")
    device, sizes = DEVICES[match[1]], [int(size) for size in match[2].split("x")]
    if platform.machine().lower() not in ("x86_64", "amd64") or platform.system() != "Linux":
        raise InputError(
            f"the compilers for TPUs and GPUs run on Linux with an x86-64 processor, and this is "
            f"{platform.system()} on {platform.machine()}"
        )
    # The devices of this machine, if it has some, are left to others.
    jax.config.update("jax_platforms", "cpu")
    load = _tpu_devices if device.gpu is None else _gpu_devices
    try:
        return device, load(device, sizes)
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:  # of the compiler, about what it is asked for
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"there is no topology {topology!r} ({reason}); there are {describe_topologies()}"
        ) from None


def _tpu_devices(device: Device, sizes: list[int]) -> list:
    axes, count = 3 if device.name == "v5p" else 2, math.prod(sizes)
    if len(sizes) not in (1, axes) or (axes == 2 and max(sizes) > 16):
        raise InputError(
            f"there is no topology {device.name}:{'x'.join(map(str, sizes))}; there are "
            f"{describe_topologies()}"
        )
    import_extra("libtpu", extra="plan")
    # So that the library looks neither for a TPU nor for another program that uses one.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    if count == 1:  # of the smallest slice that there is a name for
        sizes = [2, 2, 1][:axes]
    name = f"{device.name}:{'x'.join(map(str, sizes))}"
    return list(topologies.get_topology_desc(name, platform="tpu").devices)[:count]


def _gpu_devices(device: Device, sizes: list[int]) -> list:
    if len(sizes) > 2 or 0 in sizes:
        raise InputError(
            f"GPUs are counted by host, or by hosts and GPUs of each, as in {device.name}:2x8"
        )
    try:
        import_extra("jax_plugins.xla_cuda13", extra="plan")
    except InputError:
        import_extra("jax_plugins.xla_cuda12", extra="plan", package="jax-cuda12-plugin")
    jax.devices()  # which registers the plugin
    hosts, count = sizes if len(sizes) == 2 else (1, *sizes)
    info = device.gpu | {
        "clock_rate_ghz": device.clock / 1e9,
        "memory_bandwidth": int(device.bandwidth),
        "device_memory_size": device.memory,
    }
    fields = "".join(
        f"  {name}{'' if isinstance(value, str) else ':'} {value}\n" for name, value in info.items()
    )
    target = (
        f"gpu_device_info {{\n{fields}}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 patch: 0 }\n"
        f'device_description_str: "{device.name}"\n'
    )
    described = topologies.get_topology_desc(
        "", platform="cuda", target_config=target, topology=f"1x{hosts}x{count}"
    )
    return list(described.devices)


GPU_OPTIONS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "False"}
"""Without a device there is nothing to tune on; Triton's products need tuning."""


class Lowered(NamedTuple):
    """A program to be compiled.

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
    """The `STEPS` of a run, as `train` would run them.

    Args:
      config: of the run.
      devices: what it would run on.
      num_classes: of its data.
      image_shape: (H, W, 3) of the images of a batch.

    Raises:
      ValueError: if the config cannot be used, or its batch does not divide over the devices.
    """
    mesh = data_mesh(devices)
    check_config(config, mesh.size)
    model = abstract_model(num_classes=num_classes, **config.model)
    # The schedule is a part of the program whose size does not depend on the length of the run.
    optimizer, train_step = create_step(
        config, model, steps_per_epoch=100, total_steps=100 * config.num_epochs, mesh=mesh
    )
    state = abstract_state(model, optimizer, ema=uses_ema(config))

    def batch(size: int, **more: Any) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "image": jax.ShapeDtypeStruct((size, *image_shape), jnp.uint8),
            "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        } | {name: jax.ShapeDtypeStruct((size,), dtype) for name, dtype in more.items()}

    eval_size = math.ceil(config.eval_batch_size / mesh.size) * mesh.size
    eval_step = make_eval_step(model, normalize=create_normalize(config), mesh=mesh)
    totals = {name: jax.ShapeDtypeStruct((), dtype) for name, dtype in TOTALS.items()}
    traced = (
        train_step.func.trace(*train_step.args, state, batch(config.batch_size)),
        eval_step.trace(totals, state.variables, batch(eval_size, mask=bool)),
    )
    return {
        name: Lowered(t.lower(), count_program_macs(t.jaxpr.jaxpr))
        for name, t in zip(STEPS, traced, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class Account:
    """What a program needs, per device; nothing of it is measured.

    Attributes:
      argument_bytes: of what it is given: state and batch.
      temporary_bytes: of what it needs meanwhile.
      peak_bytes: of all that is there at once.
      device_bytes: of the device.
      flops: counted in the program: two for each multiply-add.
      bytes_accessed: of the operands and results of all operations, less what stays on the chip.
      flops_seconds: that the FLOPs need at least.
      bytes_seconds: that the bytes need at least.
      estimated_seconds: the compiler's estimate (TPU), or None.
      kernels: operations that the device is given one after the other.
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
        """Whether the device has the memory."""
        return self.peak_bytes <= self.device_bytes

    @property
    def shares(self) -> dict[str, float]:
        """Of each part, its share of the estimate (TPU) or of the bytes (GPU)."""
        key = "bytes" if self.estimated_seconds is None else "estimated_seconds"
        whole = sum(part[key] for part in self.parts.values()) or 1
        return {name: part[key] / whole for name, part in self.parts.items()}

    @property
    def seconds(self) -> float:
        """The compiler's estimate, or the least that FLOPs and bytes need."""
        return self.estimated_seconds or max(self.flops_seconds, self.bytes_seconds)


class DoesNotFitError(Exception):
    """The compiler refuses a program that needs more memory than the device has."""


def compile_account(program: Lowered, device: Device, num_devices: int) -> Account:
    """Compiles a program and reads off what it needs.

    Raises:
      DoesNotFitError: if the compiler says that it does not fit.
    """
    start = time.perf_counter()
    try:
        compiled = program.lowered.compile(
            compiler_options=None if device.gpu is None else GPU_OPTIONS
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used \S+ of \S+ \w+", str(error))
        raise DoesNotFitError(used[0] if used else "") from None
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    operations = list(operations_of(text))
    bytes_accessed = sum(operation.bytes for operation in operations)
    estimated = None
    if device.gpu is None:
        estimated = sum(operation.cycles for operation in operations) / device.clock
    collectives = list(collectives_of(text))
    flops = 2 * program.macs / num_devices
    return Account(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        device_bytes=device.memory,
        flops=flops,
        bytes_accessed=bytes_accessed,
        flops_seconds=flops / device.flops,
        bytes_seconds=bytes_accessed / device.bandwidth,
        estimated_seconds=estimated,
        kernels=len(operations),
        parts=parts_of(operations, device.clock),
        collectives=dict(collections.Counter(kind for kind, _ in collectives)),
        collective_bytes=sum(size for _, size in collectives),
        compile_seconds=seconds,
    )


def find_fit(
    config: ml_collections.ConfigDict,
    fits: Callable[[ml_collections.ConfigDict], bool],
    multiple: int,
) -> Iterator[tuple[str, bool]]:
    """What would help a run that does not fit, each tried by itself.

    Args:
      config: of the run.
      fits: tries a config.
      multiple: of which the batch has to be one, in each of its parts.

    Yields:
      A change as the command line has it, and whether the run then fits: blocks computed twice, the
      batch in parts (the fewest that fit), and smaller batches, until the largest that fits is
      known to an eighth of the batch.
    """

    def attempt(section: str, key: str, value: Any) -> tuple[str, bool]:
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            (changed[section] if section else changed)[key] = value
        name = f"{section}.{key}" if section else key
        return f"--config.{name}={value}", fits(changed)

    if not config.model.get("remat", False):
        yield attempt("model", "remat", True)
    parts = 2 * config.step.get("accumulation_steps", 1)
    while config.batch_size % (multiple * parts) == 0:
        yield (found := attempt("step", "accumulation_steps", parts))
        if found[1]:
            break
        parts *= 2
    multiple *= config.step.get("accumulation_steps", 1)
    fitting, refused = 0, config.batch_size
    while refused - fitting > max(config.batch_size // 8, multiple):
        size = max((fitting + refused) // 2 // multiple, 1) * multiple
        yield (found := attempt("", "batch_size", size))
        fitting, refused = (size, refused) if found[1] else (fitting, size)
