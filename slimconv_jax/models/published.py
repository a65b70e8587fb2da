"""The figures that the authors published, for comparison with those counted and measured here."""

from typing import NamedTuple


class Published(NamedTuple):
    """One row of the published ImageNet comparison.

    Attributes:
      system: its name in the paper.
      model: its name here, NAME or NAME@K; None if it cannot be built, because a search found its
        channels and they are not published.
      params: millions of parameters, with the digits of the paper.
      macs: billions of multiply-adds ("FLOPs") for an image of 224x224, likewise.
      top1_error: in percent.
    """

    system: str
    model: str | None
    params: str
    macs: str
    top1_error: float


IMAGENET = (
    Published("Sc-ResNet-50 (k=4/3)", "sc_resnet50@4/3", "16.76", "2.65", 22.77),
    Published("Sc-ResNet-50 (k=8/3)", "sc_resnet50@8/3", "12.10", "1.88", 24.48),
    Published("Sc-ResNet-101 (k=4/3)", "sc_resnet101@4/3", "27.96", "4.87", 22.16),
    Published("Sc-ResNeXt-101 (32x3d, k=2)", "sc_resnext101_32x3d@2", "23.70", "4.58", 21.18),
    Published("Ghost-ResNet-50 (s=2)", "ghost_resnet50", "13.95", "2.15", 24.99),
    Published("DMCP-ResNet-50", None, "23.18", "2.80", 23.50),
    Published("DMCP-ResNet-50", None, "14.47", "1.10", 25.90),
)
"""The published comparison (of Sc-ResNet-101, the published figure is an accuracy of 77.84 %)."""

CIFAR100 = {
    "resnet50": (0.0, 77.1),
    "sc_resnet50@4/3": (37.1, 78.5),
    "sc_resnet50@2": (51.2, 77.6),
    "sc_resnet50@8/3": (56.8, 78.1),
    "sc_resnet50@10/3": (59.9, 76.2),
    "sc_resnet50@4": (61.7, 75.9),
    "sc_resnet50@14/3": (62.9, 76.3),
    "sc_resnet50@16/3": (63.7, 75.4),
}
"""The published figure: parameters saved against ResNet-50, and top-1 on CIFAR-100, in percent."""


UNITS = {"params": 1e6, "macs": 1e9}


def printed(count: int, like: str) -> str:
    """Formats a count like a published one: "16.76" for millions, "2.65" for billions.

    Args:
      count: parameters, or multiply-adds.
      like: "params" or "macs", the field of `Published`.
    """
    return f"{count / UNITS[like]:.2f}"
