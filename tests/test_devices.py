import os
import subprocess
import sys

import jax
import pytest
from processes import own_errors

from slimconv_jax.devices import enable_compilation_cache, find_devices


@pytest.fixture(autouse=True)
def restored_config():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_users_cache_directory_is_the_default(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "slimconv_jax")


def test_a_directory_that_jax_was_told_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_the_devices_are_those_of_jax():
    assert find_devices() == jax.devices()


@pytest.mark.process
@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_a_sentence(platform):
    command = "from slimconv_jax.devices import find_devices; find_devices()"
    done = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "JAX_PLATFORMS": platform},
        capture_output=True,
        text=True,
    )
    message = f"JAX is set to use '{platform}' (JAX_PLATFORMS), and finds no such device"
    assert (
        own_errors(done.stderr)
        .splitlines()[-1]
        .endswith(f"InputError: {message}; without JAX_PLATFORMS it uses the devices that exist")
    )


@pytest.mark.process
def test_saved_weights_are_not_blamed_for_a_missing_platform(tmp_path):
    command = (
        "import sys\nfrom slimconv_jax.__main__ import main\n"
        "sys.exit(main(['export', sys.argv[1], sys.argv[2], '--format', 'safetensors']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, tmp_path / "model", tmp_path / "new"],
        env={**os.environ, "JAX_PLATFORMS": "tpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = own_errors(done.stderr).splitlines()[-1]
    assert last.startswith("error: JAX is set to use 'tpu' (JAX_PLATFORMS), and finds no")
    assert "Traceback" not in done.stderr and "weights" not in done.stderr
