"""Draws the picture of a run: loss and accuracy over the epochs."""

import io
from collections.abc import Sequence

from slimconv_jax.training.metrics import SPLITS


def draw_curves(lines: Sequence[dict], title: str) -> bytes:
    """Draws loss and accuracy of a run; returns a PNG.

    Args:
      lines: of `metrics.jsonl`.
      title: of the picture.
    """
    from matplotlib.figure import Figure  # slow to import, and training starts without it

    figure = Figure(figsize=(11, 4), layout="constrained")
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    for color, (split, label) in enumerate(SPLITS.items()):
        here = [line for line in lines if line["split"] == split]
        epochs = [line["epoch"] for line in here]
        is_train = split == "train"
        style = {"linewidth": 1, "alpha": 0.7} if is_train else {"marker": ".", "zorder": 3}
        style |= {"color": f"C{color}", "label": label}
        if here:
            loss.plot(epochs, [_loss(line) for line in here], **style)
            key = "accuracy" if is_train else "top1"
            accuracy.plot(epochs, [100 * line[key] for line in here], **style)
    loss.set(xlabel="epoch", ylabel="loss")
    losses = [value for value in map(_loss, lines) if value > 0]
    if losses and max(losses) > 20 * min(losses):
        loss.set_yscale("log")
    accuracy.set(xlabel="epoch", ylabel="top-1 accuracy in %")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()


def _loss(line: dict) -> float:
    """Returns the loss of training, without that of a teacher, which tests do not have."""
    return line.get("label_loss", line.get("training_loss", line["loss"]))
