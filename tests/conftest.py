"""Eight simulated devices for every test, and one cache of compiled programs for all of them."""

import importlib.metadata
import os
import shutil
import tempfile

# Read by JAX when it starts, so before anything imports it.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
# The programs run for a moment and take long to compile: half as long without optimisation, and a
# quarter of that without the emitters of fused loops, where XLA has this flag (an unknown one
# ends the process).
has_emitters_flag = importlib.metadata.version("jaxlib").startswith("0.10.")
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" if has_emitters_flag else "",
    )
)

# Many tests, in other processes too, run the same programs, which take long to compile.
_cache = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="slimconv_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def pytest_collection_modifyitems(items):
    # The longest first, so that at the end no worker is left alone with them.
    items.sort(key=lambda item: "test_hosts" not in item.nodeid)


def pytest_unconfigure():
    if _cache is not None:  # else it belongs to someone else, or to the process that began it all
        shutil.rmtree(_cache, ignore_errors=True)
