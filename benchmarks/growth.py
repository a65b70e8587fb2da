"""How the time of a training step grows with batch size, image size and depth.

    python benchmarks/growth.py [--chart FILE] [--repeats N]

It takes five to ten minutes on two CPU cores. All programs take turns; each exponent is the slope
of a line through the logarithms.
"""

import argparse
import dataclasses
import re
import statistics
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from scripts import run_script

from slimconv_jax.benchmark.measure import (
    Case,
    build,
    describe_environment,
    environment,
    take_turns,
)
from slimconv_jax.errors import require_integer
from slimconv_jax.files import check_outputs

BASE = Case("sc_resnet50", "train", 8, 64, "float32", "jax")
AXES = {
    "batch size": [dataclasses.replace(BASE, batch_size=n) for n in (4, 8, 16, 32)],
    "pixels a side": [dataclasses.replace(BASE, image_size=n) for n in (32, 64, 96, 128)],
    "layers": [dataclasses.replace(BASE, model=f"sc_resnet{n}") for n in (50, 101, 152)],
}


def position(axis: str, case: Case) -> int:
    """Where a case stands on an axis."""
    return {
        "batch size": case.batch_size,
        "pixels a side": case.image_size,
        "layers": int(re.search(r"\d+", case.model)[0]),
    }[axis]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chart", type=Path, default=Path("growth.png"), metavar="FILE")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    args = parser.parse_args()
    require_integer("repeats", args.repeats, 1)
    check_outputs(args.chart, chart=args.chart)
    jax.config.update("jax_enable_compilation_cache", False)
    where = environment()
    print(describe_environment(where), flush=True)
    cases = list(dict.fromkeys(case for axis in AXES.values() for case in axis))
    programs = {}
    for case in cases:
        programs[case] = build(case)
        print(
            f"compiled {case.model}, {case.batch_size} images of {case.image_size}x"
            f"{case.image_size}, in {programs[case].compile_seconds:.0f} s",
            flush=True,
        )
    times = take_turns([program.run for program in programs.values()], repeats=args.repeats)
    medians = dict(zip(cases, map(statistics.median, times), strict=True))
    spread = {case: (min(t), max(t)) for case, t in zip(cases, times, strict=True)}

    figure = Figure(figsize=(11, 3.6))
    for ax, (axis, points) in zip(figure.subplots(1, len(AXES)), AXES.items(), strict=True):
        x = np.array([position(axis, case) for case in points])
        y = 1000 * np.array([medians[case] for case in points])
        low, high = 1000 * np.array([spread[case] for case in points]).T
        exponent, offset = np.polyfit(np.log(x), np.log(y), 1)
        last = np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2])
        print(f"{axis}: exponent {exponent:.2f}, between the last two {last:.2f}")
        for case, milliseconds in zip(points, y, strict=True):
            print(f"  {position(axis, case):4} {milliseconds:8.1f} ms")
        ax.errorbar(x, y, yerr=[y - low, high - y], fmt="o", capsize=3)
        ax.plot(x, np.exp(offset) * x**exponent, color="0.5", zorder=0)
        ax.set(
            xscale="log",
            yscale="log",
            xlabel=axis,
            title=f"exponent {exponent:.2f}, at the end {last:.2f}",
        )
        ax.set_xticks(x, [str(value) for value in x])
        ax.set_yticks(y, [f"{value:,.0f}" for value in y])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("milliseconds a training step")
    figure.suptitle(
        f"{BASE.model}, batch size {BASE.batch_size}, {BASE.image_size}x{BASE.image_size} pixels, "
        f"{BASE.dtype}, where not varied; {where['device']}, jax {where['versions']['jax']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(args.chart, dpi=120)
    print(f"drawn in {args.chart}")


if __name__ == "__main__":
    run_script(main)
