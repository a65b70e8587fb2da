"""Studies of SlimConv on CIFAR-100: which part of it does the work, and when does it pay.

    python benchmarks/ablation.py STUDY --config.dataset.data_dir=DIR \
        [--seeds N] [--jobs N] [--config.KEY=VALUE ...]

DIR is where TensorFlow Datasets keeps CIFAR-100, by default ~/tensorflow_datasets. A study is a
question, a prediction that was written down before it ran, and variants that are trained at one
budget. Studies of the same budget share the runs of variants that they have in common. The same
command continues where it was stopped; see `sweep` for what it writes.

    python benchmarks/ablation.py STUDY --results FILE.json

writes the table and the figure of a results.json again, beside it, without training. With
`--expect FILE.json`, the results of the study from an earlier time, a study checks that the models
still learn as well.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
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
from sweep_report import read_results, require_as_good, write_report

from slimconv_jax.errors import InputError
from slimconv_jax.models.zoo import parse_model

SMALL = {
    "model.stem": "imagenet",  # of stride 4, which makes 32x32 pixels 8x8
    "model.zero_init_residual": True,
    "model.dtype": "float32",
    "optimizer.learning_rate": 0.05,
    "optimizer.schedule": "cosine",
    "optimizer.milestones": (),
    "optimizer.warmup_epochs": 3,
    "checkpoint_every_minutes": 5,
    "checkpoints_to_keep": 1,
}
"""What two CPU cores can train; the rest is the recipe of configs/cifar100.py."""

BUDGETS = {
    "fifth": SMALL
    | {
        "model.width": 32,
        "dataset.train_split": "train[:20%]",
        "num_epochs": 60,
        "eval_every_epochs": 5,
    },
    "short16": SMALL
    | {
        "model.width": 16,
        "dataset.train_split": "train[:80%]",
        "dataset.test_split": "train[80%:]",  # a choice is made with it
        "optimizer.learning_rate": 0.1,
        "optimizer.warmup_epochs": 0.4,
        "model.zero_init_residual": False,
        "num_epochs": 4,
    },
}
BUDGETS["short32"] = BUDGETS["short16"] | {"model.width": 32}
BUDGETS |= {f"fifth{n}": BUDGETS["fifth"] | {"num_epochs": n} for n in (10, 20, 30)}
BUDGETS["whole"] = BUDGETS["fifth"] | {"dataset.train_split": "train", "num_epochs": 40}
BUDGETS["full"] = {  # the architectures of the paper's figure, for an accelerator
    "model.zero_init_residual": True,
    "batch_size": 256,
    "optimizer.schedule": "cosine",
    "optimizer.milestones": (),
    "optimizer.warmup_epochs": 2,
    "num_epochs": 12,
    "eval_every_epochs": 4,
    "checkpoints_to_keep": 1,
}


@dataclasses.dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
      question: what it is about.
      prediction: what was expected before it ran.
      budget: a key of `BUDGETS`.
      variants: a model, NAME or NAME@K, perhaps with ",RECIPE" of configs/cifar100.py, and changes
        of its config, by the name of the variant.
      baseline: the variant that the others are compared with.
    """

    question: str
    prediction: str
    budget: str
    variants: dict[str, tuple[str, dict[str, Any]]]
    baseline: str = "resnet50"


MARGIN = 1.5
"""Points of top-1 by which a variant may be behind what `--expect` has."""

PLAIN = {"resnet50": ("resnet50", {})}
THREE = PLAIN | {f"k={k}": (f"sc_resnet50@{k}", {}) for k in ("4/3", "8/3")}
SQUEEZED = PLAIN | {
    f"k=4/3, min_squeezed {n}": ("sc_resnet50@4/3", {"model.min_squeezed": n}) for n in (1, 2, 4, 8)
}
GATES = {
    "k=4/3": ("sc_resnet50@4/3", {}),
    "k=4/3, plain gate": ("sc_resnet50@4/3", {"model.gating": "plain"}),
    "k=4/3, no gate": ("sc_resnet50@4/3", {"model.gating": None}),
}
_GATE = (
    "After four epochs at width 16 SlimConv is 4.3 points behind. How much of that is the gate, "
    "which squeezes 16 channels to one?"
)
_GATE_PREDICTION = (
    "Little: after four epochs all weights of a gate are still near their start, about one half. "
    "At most one point, and nothing beyond the noise from 2 to 8."
)

STUDIES = {
    "gate16": Study(_GATE, _GATE_PREDICTION, "short16", SQUEEZED),
    "gate32": Study(f"{_GATE} The same at width 32.", _GATE_PREDICTION, "short32", SQUEEZED),
    "training": Study(
        "Trained until the training images fit, on a fifth of them: does the order turn?",
        "k=4/3 is within a point of resnet50, since it fits the training images less and "
        "generalises better in relation; k=8/3 is behind both by about a point.",
        "fifth",
        THREE,
    ),
    **{
        f"epochs{n}": Study(
            f"The same in {n} epochs: is the order already that of 60?",
            "The shorter, the further SlimConv is behind: it learns more slowly. At 10 epochs it "
            "is two points behind, at 30 less than one; the order is that of 60 from 10 on.",
            f"fifth{n}",
            THREE,
        )
        for n in (10, 20, 30)
    },
    **{
        f"modern{n}": Study(
            f"{n} epochs: does the modern recipe (TrivialAugment, random erasing, mixup and "
            "CutMix, label smoothing, stochastic depth) pay?",
            "It makes the images harder, which takes time to fit: behind by three points after 10 "
            "epochs, level after 20, and ahead by five after 60, where the plain recipe has fitted "
            "nineteen of twenty training images.",
            f"fifth{n}" if n < 60 else "fifth",
            {
                "k=4/3": ("sc_resnet50@4/3", {}),
                "k=4/3, modern": ("sc_resnet50@4/3,modern", {}),
            },
            baseline="k=4/3",
        )
        for n in (10, 20, 60)
    },
    "time": Study(
        "In the time of 60 epochs of resnet50, by the images/s of two CPU cores (resnet50 419, "
        "k=4/3 467, k=8/3 547): is SlimConv ahead?",
        "The difference of equal epochs stays, within the noise: a tenth or a third more epochs "
        "at the end of a training add a quarter of a point.",
        "fifth",
        PLAIN
        | {
            "k=4/3, 67 epochs": ("sc_resnet50@4/3", {"num_epochs": 67}),
            "k=8/3, 78 epochs": ("sc_resnet50@8/3", {"num_epochs": 78}),
        },
    ),
    "training-whole": Study(
        "The same on all training images.",
        "With five times the images there is less to regularise: k=4/3 is behind by up to a point.",
        "whole",
        THREE,
    ),
    "full": Study(
        "At full width, on whole images of 32x32, as in the paper's figure: is SlimConv ahead?",
        "All fit the training images. k=4/3 is within half a point of resnet50, on either side; "
        "k=8/3 is behind by half a point. (Published, after more epochs: 77.1, 78.5 and 78.1 %.)",
        "full",
        THREE,
    ),
    **{
        f"gating{n}": Study(
            f"{n} epochs: is it the flipped gate, any gate, or the fold? And do a narrower ResNet "
            "of the same multiply-adds, or a ResNet with squeeze-and-excitation, do as well?",
            "Flipped and plain gates are equal within the noise; without a gate it is half a point "
            "less. The narrower ResNet (width 26) is behind k=4/3 by half a point; "
            "squeeze-and-excitation is ahead of all by a point.",
            f"fifth{n}" if n < 60 else "fifth",
            GATES
            | PLAIN
            | {
                "resnet50, width 26": ("resnet50", {"model.width": 26}),
                "se_resnet50": ("se_resnet50", {}),
            },
            baseline="k=4/3",
        )
        for n in (20, 60)
    },
}


def variants_of(study: Study) -> list[Variant]:
    """Returns the variants of a study, with all their settings."""
    variants = []
    for name, (model, changes) in study.variants.items():
        model, comma, recipe = model.partition(",")
        architecture, k = parse_model(model)
        settings = BUDGETS[study.budget] | ({"model.k": k} if k else {}) | changes
        config = f"{ROOT}/configs/cifar100.py:{architecture}{comma}{recipe}"
        variants.append(Variant(name, config, settings))
    return variants


def varied_keys(args: argparse.Namespace) -> list[str]:
    """Returns the keys of the config in which the variants of a study differ."""
    changes = [changes for _, changes in STUDIES[args.study].variants.values()]
    return ["model.name", "model.k", *(key for keys in changes for key in keys)]


def draw(results: Sequence[dict], rows: Sequence[dict], path: Path) -> None:
    """Draws the top-1 of every seed with the means, and beside it the mean curves."""
    figure = Figure(figsize=(11, 1.8 + 0.45 * len(rows) + 2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, row in enumerate(rows):
        color = colormaps["tab10"](place % 10)
        runs = [result for result in results if result["variant"] == row["variant"]]
        top1 = [100 * run["top1"] for run in runs]
        left.plot(top1, [place] * len(runs), "o", color=color, alpha=0.5)
        left.plot(row["top1"], place, "|", color=color, markersize=22, markeredgewidth=2.5)
        for split, style in (("test", "-"), ("train", ":")):
            curves = [{epoch: top1 for epoch, _, top1 in run["curves"][split]} for run in runs]
            # A run that was interrupted has lines more.
            epochs = sorted(set.intersection(*map(set, curves)))
            means = [100 * statistics.mean(curve[epoch] for curve in curves) for epoch in epochs]
            label = row["variant"] if split == "test" else None
            right.plot(epochs, means, style, color=color, linewidth=1.2, label=label)
    left.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    left.invert_yaxis()
    left.margins(y=0.15)
    left.set_xlabel("top-1 after the last epoch, % (a dot a seed, a bar the mean)")
    left.grid(axis="x", alpha=0.3)
    right.set_xlabel("epoch")
    right.set_ylabel("top-1, % (solid), and training accuracy (dotted)")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    usage = "%(prog)s STUDY [options] [--config.KEY=VALUE ...]"
    studies = "\n".join(f"  {name:15} {study.question}" for name, study in STUDIES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__.splitlines()[0]}\n\nstudies:\n{studies}",
        usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=STUDIES, metavar="STUDY")
    add_options(parser, workdir="runs/ablation", seeds=3)
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="write the table and figure of these results again; train nothing",
    )
    parser.add_argument(
        "--expect",
        type=Path,
        metavar="FILE",
        help=f"fail if a variant is {MARGIN} points or more behind these results of the study",
    )
    args, overrides = parse_options(parser, varied_keys)
    study = STUDIES[args.study]
    path = args.results or args.workdir / args.study / "results.json"
    budget = f"{study.budget}{describe_overrides(overrides)}"
    title = f"{study.question}\n\nPredicted: {study.prediction}\n\nBudget: {budget}."

    def report(results: Sequence[dict]) -> None:
        options = {"title": title, "baseline": study.baseline, "published": {}}
        write_report(results, path, draw=draw, **options)

    if args.results:
        title, results = read_results(path)
        if not {result["variant"] for result in results} <= study.variants.keys():
            raise InputError(f"{path} has the results of another study than {args.study}")
        report(results)
    else:
        runs = plan_runs(variants_of(study), args.seeds, args.workdir / study.budget, overrides)
        train_all(runs, args.jobs, report)
    print(path.with_suffix(".md").read_text())
    print(f"in {path.parent}: {path.name}, {path.stem}.md, {path.stem}.png")
    if args.expect:
        require_as_good(read_results(path)[1], args.expect, MARGIN)


if __name__ == "__main__":
    run_script(main)
