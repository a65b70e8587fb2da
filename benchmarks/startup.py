"""How long a training run takes to start: from the command to its first finished step.

    python benchmarks/startup.py [--repeats N] [--config CONFIG]

Once with an empty compilation cache, then several times with what the first start left in it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts import run_script

from slimconv_jax.errors import require_integer

ROOT = Path(__file__).parents[1]


def seconds_to_first_step(config: str, cache: str) -> float:
    """Starts a run in an empty work directory, and ends it when the first step is reported."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "train.py", "--config", config, "--workdir", workdir]
        environment = os.environ | {"XDG_CACHE_HOME": cache, "PYTHONUNBUFFERED": "1"}
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--config.log_every_steps=1"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = []
        try:
            for line in process.stdout:
                if line.startswith("step ") and "loss" in line:
                    return time.perf_counter() - start
                said.append(line)
            sys.exit(f"the run ended before its first step:\n{''.join(said)}")
        finally:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="digits")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of the warm start")
    args = parser.parse_args()
    require_integer("repeats", args.repeats, 1)
    with tempfile.TemporaryDirectory() as cache:
        print(f"{args.config}, {os.cpu_count()} CPU cores; from the command to the first step")
        print(f"cold: {seconds_to_first_step(args.config, cache):.1f} s", flush=True)
        warm = [seconds_to_first_step(args.config, cache) for _ in range(args.repeats)]
    print(
        f"warm: {statistics.median(warm):.1f} s, median of {args.repeats} "
        f"({min(warm):.1f} to {max(warm):.1f} s)"
    )


if __name__ == "__main__":
    run_script(main)
