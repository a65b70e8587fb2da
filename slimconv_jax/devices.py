"""Finds devices, shards arrays over them, and sets up the compilation cache."""

import logging
import os
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from slimconv_jax.errors import InputError


def find_devices() -> list[jax.Device]:
    """Returns `jax.devices()`, all devices of all processes.

    Raises:
      ValueError: if there are none, or none of the platform that JAX is set to use.
    """
    logger, records = logging.getLogger("jax._src.xla_bridge"), []
    # JAX logs tracebacks of libraries that it cannot load; they are shown only if it finds devices.
    logger.addFilter(records.append)
    try:
        devices = jax.devices()
    except (AssertionError, RuntimeError) as error:
        reason = f"JAX finds no devices: {str(error).partition(' (set JAX_PLATFORMS')[0]}"
        name, platforms = "JAX_PLATFORMS", jax.config.jax_platforms
        if not platforms:
            name, platforms = "JAX_PLATFORM_NAME", os.environ.get("JAX_PLATFORM_NAME")
        if platforms:
            reason = (
                f"JAX is set to use {platforms!r} ({name}), and finds no such device; without "
                f"{name} it uses the devices that exist"
            )
        raise InputError(reason) from None
    finally:
        logger.removeFilter(records.append)
    for record in records:
        logger.handle(record)
    return devices


def data_mesh(devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Builds a mesh with one axis, "data", over the given devices or all devices.

    The devices of a process are neighbours, so that its share of a batch is contiguous.
    """
    devices = find_devices() if devices is None else devices
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return jax.sharding.Mesh(np.array(devices), ("data",))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of the state: a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def enable_compilation_cache() -> None:
    """Keeps compiled programs for the next start, unless JAX has a cache directory already.

    They go to `$XDG_CACHE_HOME/slimconv_jax`, by default `~/.cache/slimconv_jax`. To choose
    another directory, set `JAX_COMPILATION_CACHE_DIR`; to keep nothing, set
    `JAX_ENABLE_COMPILATION_CACHE=false`.
    """
    if jax.config.jax_compilation_cache_dir is None:
        cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(cache_home, "slimconv_jax")))
    # JAX's default of one second leaves out the many small programs of an initialisation.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
