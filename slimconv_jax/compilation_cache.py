"""JAX's persistent compilation cache, switched on for the command lines."""

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Keeps compiled programs for the next start, unless JAX is told another place already.

    They go to `$XDG_CACHE_HOME/slimconv_jax`, by default `~/.cache/slimconv_jax`. To choose
    another directory set `JAX_COMPILATION_CACHE_DIR`; to keep nothing, set
    `JAX_ENABLE_COMPILATION_CACHE=false`.
    """
    if jax.config.jax_compilation_cache_dir is None:
        cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(cache_home) / "slimconv_jax"
        jax.config.update("jax_compilation_cache_dir", str(directory))
    # JAX's default of one second leaves out the many small programs of an initialisation.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
