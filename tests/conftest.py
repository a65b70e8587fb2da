"""Eight simulated devices for every test, and one cache of compiled programs for all of them."""

import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile

import pytest

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
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" if has_emitters_flag else "",
    )
)

# Tracing makes many objects, and what was compiled stays: to collect often costs much time.
gc.set_threshold(200_000, 50, 50)

# Many tests, in other processes too, run the same programs, which take long to compile.
_cache = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="slimconv_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def pytest_collection_modifyitems(items):
    # A file goes to one worker: the large ones first, so that none is left alone with one.
    items.sort(key=lambda item: -item.path.stat().st_size)


_alone = None
"""The test that is running, if it is not one of those that start processes."""


def _refuse_processes(event, arguments):
    if _alone is not None and event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        raise RuntimeError(f"{_alone} starts a process: mark it with pytest.mark.process")


sys.addaudithook(_refuse_processes)


@pytest.fixture(autouse=True)
def no_process_unmarked(request):
    """Tests that start processes take seconds each: they have a marker and a run of their own."""
    global _alone
    if not {"process", "slow", "long"} & {mark.name for mark in request.node.iter_markers()}:
        _alone = request.node.nodeid
    yield
    _alone = None


def pytest_unconfigure():
    if _cache is not None:  # else it belongs to someone else, or to the process that began it all
        shutil.rmtree(_cache, ignore_errors=True)
