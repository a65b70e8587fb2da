"""The output of `slimconv benchmark`: tables, ratios, JSON and a chart."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from slimconv_jax.benchmark.measure import (
    Case,
    describe_environment,
    environment,
    measure,
    require_onnxruntime,
    require_torch,
)
from slimconv_jax.console import Status
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.files import check_outputs, write_json

CHARTS = (".png", ".svg", ".pdf")

HEADER = (
    f"{'model':24} {'program':13} {'images/s':>9} {'slowest - fastest':>19} {'compile':>8} "
    f"{'memory':>8} {'GFLOP/s':>8} {'of peak':>8}"
)


def table_rows(rows: Sequence[dict]) -> Iterator[str]:
    """Yields the measured cases as lines under `HEADER`."""
    for row in rows:
        seconds, memory = row["compile_seconds"], row["memory_bytes"]
        spread = f"{row['slowest']:.1f} - {row['fastest']:.1f}"
        yield (
            f"{row['model']:24} {row['implementation']:13} {row['images_per_second']:9.1f} "
            f"{spread:>19} {'-' if seconds is None else f'{seconds:.1f} s':>8} "
            f"{'-' if memory is None else f'{memory / 2**20:,.0f} M':>8} "
            f"{row['flops_per_second'] / 1e9:8,.0f} {row['peak_share']:8.0%}"
        )


def ratios(rows: Sequence[dict]) -> Iterator[str]:
    """Yields the ratios of one group: each model here against PyTorch, and Sc against plain."""
    speed = {(row["model"], row["implementation"]): row["images_per_second"] for row in rows}
    macs = {
        row["model"]: row["flops_per_second"] / row["images_per_second"]
        for row in rows
        if row["implementation"] == "jax"
    }
    for (model, implementation), other in speed.items():
        if implementation != "jax" and (model, "jax") in speed:
            yield f"{model}: {speed[model, 'jax'] / other:.2f} x {implementation}"
    for model in macs:
        plain = model.partition("@")[0].removeprefix("sc_")
        if plain != model and plain in macs:
            yield (
                f"{model}: {speed[model, 'jax'] / speed[plain, 'jax']:.2f} x {plain}, which has "
                f"{macs[plain] / macs[model]:.2f} x its multiply-adds"
            )


def choose_implementations(
    wanted: Sequence[str] | None, *, modes: Sequence[str], dtypes: Sequence[str]
) -> Sequence[str]:
    """Returns the implementations to measure: by default JAX, and PyTorch if it works here.

    Raises:
      ValueError: if a wanted one cannot be measured here.
    """
    if not wanted:
        try:
            require_torch()
        except InputError as error:
            print(f"nothing is compared with PyTorch: {error}", file=sys.stderr)
            return ["jax"]
        return ["jax", "torch"]
    if "onnxruntime" in wanted:
        require_onnxruntime(modes, dtypes)
    if not {"torch", "torch.compile"}.isdisjoint(wanted):
        require_torch()
    return wanted


def run(
    groups: Sequence[Sequence[Case]],
    *,
    repeats: int,
    command: str,
    json_path: Path | None,
    chart_path: Path | None,
) -> None:
    """Measures groups of cases, and prints the results of each group when it is done.

    Args:
      groups: from `plan`.
      repeats: turns of each group.
      command: the command line, for the JSON.
      json_path: a file for the figures, written again after each group; None for none.
      chart_path: a file for the chart; None for none.

    Raises:
      ValueError: if a file cannot be written, or a case cannot be measured.
    """
    require_integer("--repeats", repeats, 1)
    check_outputs(json_path, chart_path)
    if chart_path and chart_path.suffix not in CHARTS:
        raise InputError(f"cannot draw {chart_path}: it must end in {', '.join(CHARTS)}")
    report = {"command": command, **environment(), "repeats": repeats, "results": []}
    print(describe_environment(report), flush=True)
    for cases in groups:
        first = cases[0]
        size = f"{first.image_size}x{first.image_size}"
        print(f"\n{first.mode}, {first.dtype}, batches of {first.batch_size}, {size}", flush=True)
        with Status() as status:
            rows = measure(cases, repeats=repeats, progress=status.update)
        print("\n".join([HEADER, *table_rows(rows), *ratios(rows)]), flush=True)
        report["results"] += rows
        if json_path:
            write_json(json_path, report)
    print(
        f"\nimages/s: medians of {repeats} turns, one program of a group after another. FLOP/s:\n"
        "two for each multiply-add of the architecture, in training three times those of the\n"
        "forward pass. Peak: of a large matrix product in the same turns. Compile: with tracing.\n"
        "Inference: JAX folds batch norm into the convolutions, PyTorch does not."
    )
    if chart_path:
        draw_chart(report, chart_path)


def draw_chart(report: dict, path: Path) -> None:
    """Draws the images per second of all cases as bars, with the slowest and the fastest turn.

    Raises:
      ValueError: if the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes a while

    groups = {}
    for row in report["results"]:
        groups.setdefault((row["mode"], row["dtype"], row["batch_size"]), []).append(row)
    implementations = list(dict.fromkeys(row["implementation"] for row in report["results"]))
    models = list(dict.fromkeys(row["model"] for row in report["results"]))
    inches = 0.7 + 0.28 * len(models) * len(implementations)
    figure = Figure(figsize=(9, 1 + len(groups) * inches))
    axes = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for ax, ((mode, dtype, batch_size), rows) in zip(axes, groups.items(), strict=True):
        height = 0.8 / len(implementations)
        for index, implementation in enumerate(implementations):
            mine = [row for row in rows if row["implementation"] == implementation]
            keys = ("images_per_second", "slowest", "fastest")
            speed, low, high = (np.array([row[key] for row in mine]) for key in keys)
            offset = (index - (len(implementations) - 1) / 2) * height
            positions = [models.index(row["model"]) + offset for row in mine]
            ax.barh(
                positions,
                speed,
                0.9 * height,
                xerr=[speed - low, high - speed],
                label=implementation,
                error_kw={"ecolor": "0.3", "elinewidth": 1},
            )
            for x, y in zip(speed, positions, strict=True):
                ax.text(0.01 * ax.get_xlim()[1], y, f"{x:,.1f}", va="center", color="white")
        ax.set_yticks(range(len(models)), models)
        ax.invert_yaxis()
        ax.set_title(f"{mode}, {dtype}, batch size {batch_size}", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    axes[-1].set_xlabel(
        f"images per second at {rows[0]['image_size']}x{rows[0]['image_size']} pixels (medians; "
        f"lines from the slowest to the fastest turn)\n{report['device']}"
    )
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {error}") from None
