"""What the finished runs of `cifar100_compression.py` say, as JSON, a table and a figure."""

import json
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slimconv_jax.errors import InputError
from slimconv_jax.files import read_json, replace_file
from slimconv_jax.models.published import CIFAR100
from slimconv_jax.models.zoo import parse_model
from slimconv_jax.storage.work_directory import CONFIG, compared_keys
from slimconv_jax.training.config import default_values

BASELINE = "resnet50"
OTHERS = ("black", "magenta", "grey", "saddlebrown")
"""Colours of models that are not in the published figure."""

RESULT = ("model", "seed", "params", "macs", "top1", "images_per_second", "jobs", "where")
"""What is in a result.json."""

OF_ONE_RUN = ("model.name", "model.k", "seed")
"""The values of a config in which the runs of a sweep differ."""


def read_result(workdir: Path, settings: dict, but_for: Sequence[str] = ()) -> dict | None:
    """The result.json of a run, if it is complete and of a config with these settings."""
    try:
        result = read_json(workdir / "result.json")
        there = compared_keys(read_json(workdir / CONFIG), default_values())
    except InputError:
        return None
    if not isinstance(result, dict) or result.keys() != set(RESULT):
        return None
    same = all(
        there.get(key) == settings.get(key) for key in (there | settings) if key not in but_for
    )
    return result if same else None


class Report:
    """What the finished runs of a budget say, as JSON, a table and a figure.

    Args:
      workdir: has a work directory for each run, of this call or another one.
      settings: a config of this budget.
      baseline_params: parameters of ResNet-50.
      budget: in words.
    """

    def __init__(self, workdir: Path, settings: dict, baseline_params: int, budget: str):
        self._workdir, self._settings, self._budget = workdir, settings, budget
        self._baseline_params = baseline_params

    def rows(self) -> list[dict]:
        """For each model with a finished run what is known of it; accuracies are in percent."""
        results = {}
        for file in sorted(self._workdir.glob("*/result.json")):
            if result := read_result(file.parent, self._settings, but_for=OF_ONE_RUN):
                results.setdefault(result["model"], []).append(result)
        order = {model: place for place, model in enumerate(CIFAR100)}
        baseline = {r["seed"]: 100 * r["top1"] for r in results.get(BASELINE, [])}
        rows = []
        for model in sorted(results, key=lambda model: order.get(model, len(order))):
            of_model = sorted(results[model], key=lambda result: result["seed"])
            top1 = {result["seed"]: 100 * result["top1"] for result in of_model}
            gains = [top1[seed] - baseline[seed] for seed in top1 if seed in baseline]
            speeds = [r["images_per_second"] for r in of_model if r["images_per_second"]]
            params = of_model[0]["params"]
            row = {
                "model": model,
                "params": params,
                "macs": of_model[0]["macs"],
                "compression": 1 - params / self._baseline_params,
                "top1_by_seed": top1,
                "top1": statistics.mean(top1.values()),
                "top1_sd": statistics.stdev(top1.values()) if len(top1) > 1 else None,
                "gain": statistics.mean(gains) if gains else None,
                "gain_sd": statistics.stdev(gains) if len(gains) > 1 else None,
                "published_top1": CIFAR100.get(model, (None, None))[1],
                "images_per_second": statistics.median(speeds) if speeds else None,
                "measured": sorted({describe_machine(result) for result in of_model}),
            }
            rows.append(row)
        return rows

    def write(self) -> None:
        """Writes results.json, results.md and compression.png."""
        rows = self.rows()
        if not rows:
            return
        content = {"budget": self._budget, "models": rows}
        text = json.dumps(content, indent=2) + "\n"
        try:
            replace_file(self._workdir / "results.json", text.encode())
            replace_file(self._workdir / "results.md", self.table(rows).encode())
            self.draw(rows, self._workdir / "compression.png")
        except OSError as error:
            raise InputError(f"cannot write to {self._workdir}: {error.strerror}") from None

    def table(self, rows: Sequence[dict]) -> str:
        """A Markdown table."""

        def spread(row: dict, key: str, sign: str = "") -> str:
            if row[key] is None:
                return "-"
            sd = row[f"{key}_sd"]
            return f"{row[key]:{sign}.2f}" + ("" if sd is None else f" ± {sd:.2f}")

        lines = [
            f"{self._budget}.",
            "",
            "| model | parameters | compression | MACs | seeds | top-1, % | against resnet50 "
            "| published top-1, % | images/s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            gain = "" if row["model"] == BASELINE else spread(row, "gain", "+")
            speed = row["images_per_second"]
            lines.append(
                f"| {row['model']} | {row['params']:,} | {row['compression']:.1%} "
                f"| {row['macs']:,} | {len(row['top1_by_seed'])} | {spread(row, 'top1')} | {gain} "
                f"| {row['published_top1'] or ''} | {f'{speed:,.0f}' if speed else '-'} |"
            )
        machines = sorted({machine for row in rows for machine in row["measured"]})
        lines += [
            "",
            "Compression: parameters saved against resnet50 of the same width. Top-1: after the "
            "last epoch, mean and standard deviation over the seeds; against resnet50: of the "
            "differences seed by seed, where resnet50 is among the runs. Images/s: in training.",
            "",
            *(f"Measured on {machine}." for machine in machines),
            "",
        ]
        return "\n".join(lines)

    def draw(self, rows: Sequence[dict], path: Path) -> None:
        """Top-1 against compression, published and here, one above the other."""
        figure = Figure(figsize=(8.5, 8), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        published = [(model, *point, 0) for model, point in CIFAR100.items()]
        here = [
            (row["model"], 100 * row["compression"], row["top1"], row["top1_sd"] or 0)
            for row in rows
        ]
        models = list(dict.fromkeys(model for model, *_ in published + here))
        draw_points(above, "published", published, models)
        draw_points(below, textwrap.fill(f"here: {self._budget}", 90), here, models)
        figure.legend(*merged_legend(above, below), loc="outside right upper", fontsize=9)
        below.set_xlabel("parameters saved against ResNet-50, %")
        if any(sd for *_, sd in here):
            below.set_ylabel("top-1, % (mean and standard deviation over seeds)")
        figure.savefig(path, dpi=120)


def describe_machine(result: dict) -> str:
    """Where and how the images a second of a run were measured."""
    where, jobs = result["where"], result["jobs"]
    packages = (f"{name} {version}" for name, version in where["versions"].items())
    at_once = f", {jobs} runs at once" if jobs > 1 else ""
    return f"{where['device']}{at_once} ({', '.join(packages)})"


def draw_points(
    ax: Axes,
    title: str,
    points: Sequence[tuple[str, float, float, float]],
    models: Sequence[str],
) -> None:
    """Draws models: their names, compression, top-1 and its standard deviation, in percent.

    The place of a model in `models` gives its colour.
    """
    for model, x, top1, sd in points:
        name, k = parse_model(model)
        place = models.index(model)  # first those of the published figure
        if place < len(CIFAR100):
            color = colormaps["turbo"](0.05 + 0.9 * place / (len(CIFAR100) - 1))
        else:
            color = OTHERS[(place - len(CIFAR100)) % len(OTHERS)]
        label = f"k = {k}" if name == "sc_resnet50" else model.removesuffix(".json")
        ax.errorbar(x, top1, yerr=sd, fmt="o" if k else "s", color=color, capsize=3, label=label)
        if model == BASELINE:
            ax.axhline(top1, color="0.7", linewidth=1, zorder=0)
    ax.set_title(title, loc="left", fontsize=9)
    ax.set_ylabel("top-1 on CIFAR-100, %")
    ax.grid(alpha=0.3)
    ax.margins(0.08, 0.1)


def merged_legend(*axes: Axes) -> tuple[list, list]:
    """The handles and labels of several axes, each label once."""
    entries = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return list(entries.values()), list(entries)
