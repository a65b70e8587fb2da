"""What the scripts share: how they run, and processes side by side."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

from slimconv_jax.console import exit_status, prepare_console
from slimconv_jax.errors import InputError


def run_script(main: Callable[[], None]) -> None:
    """Runs a script whose purpose is its output; see `exit_status`."""
    prepare_console(needs_stdout=True)
    if status := exit_status(main):
        sys.exit(status)


def core_shares(count: int) -> list[set[int]]:
    """Splits the CPU cores of this process into `count` shares, for processes side by side.

    Shares are empty where there are fewer cores, or where the system does not report them.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(cores[index::count]) for index in range(count)]


def environment_apart() -> dict:
    """Calls `environment` in another process, so that this one leaves the device to others."""
    code = (
        "import json; from slimconv_jax.benchmark.measure import environment\n"
        "print(json.dumps(environment()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"JAX finds no device: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
