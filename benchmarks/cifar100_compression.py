"""The paper's compression curve: ResNet-50 and Sc-ResNet-50 on CIFAR-100, at seven ratios k.

    python benchmarks/cifar100_compression.py --config.dataset.data_dir=DIR \
        [--epochs N] [--width N] [--seeds N] [--models NAME@K ...] [--config.KEY=VALUE ...]

DIR is where TensorFlow Datasets keeps CIFAR-100, by default ~/tensorflow_datasets. Every model is
trained with every seed by train.py, in a process and a work directory of its own, with the recipe
of configs/cifar100.py. Its learning rate falls in steps over 200 epochs; for other
numbers of epochs it rises over the first tenth and falls as a cosine. --config.KEY=VALUE is for
train.py and holds for all models.

The same command continues where it was stopped, and skips what is finished; with more seeds or
models it adds them. After each run, results.json, results.md and results.png in the work directory
are those of the finished runs of this call. The comparison is with resnet50, where it is among the
models.
"""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scripts import run_script
from sweep import (
    ROOT,
    Variant,
    add_options,
    describe_overrides,
    parse_options,
    plan_runs,
    train_all,
)
from sweep_report import write_report

from slimconv_jax.errors import require_integer
from slimconv_jax.models.published import CIFAR100
from slimconv_jax.models.zoo import normalize_model, parse_model

BASELINE = "resnet50"
RECIPE_EPOCHS = 200
OTHERS = ("black", "magenta", "grey", "saddlebrown")
"""Colours of models that are not in the published figure."""


def variant_of(model: str, epochs: int, width: int) -> Variant:
    """Returns the variant of a model, NAME or NAME@K, for a budget."""
    name, k = parse_model(model)
    settings = {"model.width": width, "num_epochs": epochs} | ({"model.k": k} if k else {})
    if epochs != RECIPE_EPOCHS:
        settings["optimizer.schedule"] = "cosine"
        settings["optimizer.milestones"] = ()
        settings["optimizer.warmup_epochs"] = epochs / 10
    shown = Path(model).stem if model.endswith(".json") else model
    _, published = CIFAR100.get(model, (None, None))
    return Variant(shown, f"{ROOT}/configs/cifar100.py:{name}", settings, published)


def describe_budget(epochs: int, width: int, overrides: Sequence[str]) -> str:
    """Returns the budget in words, with what else is not the recipe's."""
    extra = describe_overrides(overrides)
    schedule = "multistep" if epochs == RECIPE_EPOCHS else "cosine"
    return f"width {width}, {epochs} epoch{'s' if epochs > 1 else ''} ({schedule}){extra}"


def draw(results: Sequence[dict], rows: Sequence[dict], path: Path, budget: str) -> None:
    """Draws top-1 against compression, published and here, one above the other."""
    figure = Figure(figsize=(8.5, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    published = [(model, *point, 0) for model, point in CIFAR100.items()]
    here = [(r["variant"], 100 * r["compression"], r["top1"], r["top1_sd"]) for r in rows]
    models = list(dict.fromkeys(model for model, *_ in published + here))
    draw_points(above, "published", published, models)
    draw_points(below, textwrap.fill(f"here: {budget}", 90), here, models)
    entries = {}
    for ax in (above, below):
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries, loc="outside right upper", fontsize=9)
    below.set_xlabel("parameters saved against ResNet-50, %")
    below.set_ylabel("top-1, % (mean and standard deviation over seeds)")
    figure.savefig(path, dpi=120)


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
        label = f"k = {k}" if name == "sc_resnet50" else model
        ax.errorbar(x, top1, yerr=sd, fmt="o" if k else "s", color=color, capsize=3, label=label)
        if model == BASELINE:
            ax.axhline(top1, color="0.7", linewidth=1, zorder=0)
    ax.set_title(title, loc="left", fontsize=9)
    ax.set_ylabel("top-1 on CIFAR-100, %")
    ax.grid(alpha=0.3)
    ax.margins(0.08, 0.1)


def main() -> None:
    usage = "%(prog)s [options] [--config.KEY=VALUE ...]"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=usage)
    add_options(parser, workdir="runs/cifar100_compression", seeds=1)
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=list(CIFAR100),
        metavar="NAME[@K]",
        help="(default: resnet50, and sc_resnet50 at the seven k of the figure)",
    )
    add("--epochs", type=int, default=RECIPE_EPOCHS, metavar="N", help="(default: %(default)s)")
    add(
        "--width",
        type=int,
        default=64,
        metavar="N",
        help="channels of the stem, and the others in proportion (default: 64)",
    )
    reserved = ("model.name", "model.k", "model.width", "num_epochs")
    args, overrides = parse_options(parser, lambda _: reserved)
    for name in ("epochs", "width"):
        require_integer(f"--{name}", getattr(args, name), 1)
    models = dict.fromkeys(map(normalize_model, args.models))
    variants = [variant_of(model, args.epochs, args.width) for model in models]
    runs = plan_runs(variants, args.seeds, args.workdir, overrides)
    budget = describe_budget(args.epochs, args.width, overrides)

    def report(results: Sequence[dict]) -> None:
        write_report(
            results,
            args.workdir / "results.json",
            title=f"CIFAR-100: {budget}.",
            baseline=BASELINE,
            published={v.name: v.published_top1 for v in variants if v.published_top1},
            draw=lambda results, rows, path: draw(results, rows, path, budget),
        )

    train_all(runs, args.jobs, report)
    print((args.workdir / "results.md").read_text())
    print(f"in {args.workdir}: results.json, results.md, results.png")


if __name__ == "__main__":
    run_script(main)
