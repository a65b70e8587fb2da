"""What the finished runs of a sweep say: a table, a figure, and the JSON to draw both from."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import scipy.stats

from slimconv_jax.errors import InputError
from slimconv_jax.files import read_json, replace_file

RESULT = (
    *("variant", "seed", "params", "macs", "top1", "loss", "train_accuracy", "images_per_second"),
    *("jobs", "where", "curves"),
)
"""What is in a result.json; `curves` has a list [epoch, loss, accuracy] of lists for each split."""


def summarize(results: Sequence[dict], baseline: str) -> list[dict[str, Any]]:
    """Returns a row for each variant, in their order; accuracies are in percent.

    A `gain` is the mean of the differences in top-1 from the baseline, seed by seed; `gain_ci` is
    half of the width of its 95 % confidence interval, by Student's t distribution. `compression`
    is the share of the baseline's parameters that a variant saves.
    """
    rows = []
    whole = next((r["params"] for r in results if r["variant"] == baseline), math.nan)
    of_baseline = {r["seed"]: r for r in results if r["variant"] == baseline}
    for variant in dict.fromkeys(result["variant"] for result in results):
        runs = [result for result in results if result["variant"] == variant]
        pairs = [(run, of_baseline[run["seed"]]) for run in runs if run["seed"] in of_baseline]
        gains = [100 * (run["top1"] - other["top1"]) for run, other in pairs]
        speeds = [run["images_per_second"] for run in runs if run["images_per_second"]]
        row = {key: runs[0][key] for key in ("variant", "params", "macs")}
        row |= {"seeds": len(runs), "images_per_second": statistics.median(speeds or [math.nan])}
        for key in ("top1", "train_accuracy"):
            row[key], row[f"{key}_sd"] = _mean_and_sd([100 * run[key] for run in runs])
        row["loss"], row["loss_sd"] = _mean_and_sd([run["loss"] for run in runs])
        gain, sd = _mean_and_sd(gains)
        quantile = scipy.stats.t.ppf(0.975, max(len(gains) - 1, 1))
        row |= {"gain": gain, "gain_ci": quantile * sd / math.sqrt(max(len(gains), 1))}
        row["compression"] = 1 - row["params"] / whole
        rows.append(row)
    return rows


def _mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    mean = statistics.mean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def table(rows: Sequence[dict], baseline: str, published: dict[str, float]) -> str:
    """Returns rows of `summarize` as a Markdown table."""
    columns = ["model", "parameters", "compression", "MACs", "seeds", "training accuracy, %"]
    columns += ["test loss", "top-1, % (± sd)", f"against {baseline} (95 % interval)"]
    columns += ["published top-1, %", "images/s"] if published else ["images/s"]
    lines = [_row(columns), _row(["---"] * len(columns))]
    for row in rows:
        cells = [row["variant"], f"{row['params']:,}", f"{row['compression']:.1%}"]
        cells += [f"{row['macs']:,}", f"{row['seeds']}", f"{row['train_accuracy']:.1f}"]
        cells += [f"{row['loss']:.3f}", _spread(row["top1"], row["top1_sd"])]
        cells += ["" if row["variant"] == baseline else _spread(row["gain"], row["gain_ci"], "+")]
        cells += [str(published.get(row["variant"], ""))] if published else []
        cells += [f"{row['images_per_second']:,.0f}"]
        lines.append(_row("-" if cell.lstrip("+").startswith("nan") else cell for cell in cells))
    return "\n".join(lines) + "\n"


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(value: float, spread: float, sign: str = "") -> str:
    return f"{value:{sign}.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}")


NOTE = """Compression: parameters saved against {baseline}. Training accuracy: in the last epoch, on
augmented images. Top-1: after the last epoch, mean and standard deviation over the seeds. Against
{baseline}: mean of the differences, seed by seed where both are finished, and its 95 % confidence
interval. Images/s: in training."""


def write_report(
    results: Sequence[dict],
    path: Path,
    *,
    title: str,
    baseline: str,
    published: dict[str, float],
    draw: Callable[[Sequence[dict], Sequence[dict], Path], None],
) -> None:
    """Writes the results, a table of them and a figure.

    Args:
      results: of the finished runs.
      path: of the JSON file; the table and the figure get the same name, with .md and .png.
      title: what the sweep is and its budget, in words.
      baseline: the variant that the others are compared with.
      published: top-1 of the paper by variant, in percent.
      draw: is called with the results, the rows of `summarize`, and the path of the figure.

    Raises:
      ValueError: if the files cannot be written.
    """
    rows = summarize(results, baseline)
    lines = ",\n".join(f"  {json.dumps(result)}" for result in results)
    content = f'{{"title": {json.dumps(title)},\n "runs": [\n{lines}\n]}}\n'
    machines = sorted({_describe_machine(result) for result in results})
    text = f"{title}\n\n{table(rows, baseline, published)}\n{NOTE.format(baseline=baseline)}\n\n"
    text += "".join(f"Measured on {machine}.\n" for machine in machines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.encode())
        replace_file(path.with_suffix(".md"), text.encode())
        draw(results, rows, path.with_suffix(".png"))
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror}") from None


def read_results(path: Path) -> tuple[str, list[dict]]:
    """Reads the title and the results in a JSON file of `write_report`.

    Raises:
      ValueError: if there is no such file, or it is damaged.
    """
    content = read_json(path)
    content = content if isinstance(content, dict) else {}
    title, results = content.get("title"), content.get("runs")
    if not results or any(not isinstance(r, dict) or r.keys() != set(RESULT) for r in results):
        raise InputError(f"{path} has no results of a sweep")
    return title, results


def require_as_good(results: Sequence[dict], expected: Path, points: float) -> None:
    """Checks that no variant has come to learn worse.

    Args:
      results: of the finished runs.
      expected: a JSON file of `write_report`.
      points: by how much the mean top-1 of a variant may be behind that in the file, in percent.

    Raises:
      ValueError: if one is further behind or is not in the file, or if there is no such file.
    """
    _, before = read_results(expected)
    means = {row["variant"]: row["top1"] for row in summarize(before, "")}
    for row in summarize(results, ""):
        name, top1 = row["variant"], row["top1"]
        if name not in means:
            raise InputError(f"{expected} has no results of {name}")
        if top1 < means[name] - points:
            raise InputError(
                f"{name} learns worse: top-1 {top1:.2f} %, more than {points} points behind the "
                f"{means[name]:.2f} % in {expected}"
            )


def _describe_machine(result: dict) -> str:
    where, jobs = result["where"], result["jobs"]
    packages = (f"{name} {version}" for name, version in where["versions"].items())
    at_once = f", {jobs} runs at once" if jobs > 1 else ""
    return f"{where['device']}{at_once} ({', '.join(packages)})"
