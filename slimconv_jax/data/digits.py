"""The handwritten digits that ship with this package, as they are."""

from pathlib import Path
from typing import NamedTuple

import numpy as np


class Digits(NamedTuple):
    """1797 handwritten digits.

    Attributes:
      images: (1797, 8, 8), uint8, from 0 to 16.
      labels: (1797,), int.
      is_test: (1797,), bool: True for the 360 test images.
    """

    images: np.ndarray
    labels: np.ndarray
    is_test: np.ndarray


def read_digits() -> Digits:
    """Reads the test set of "Optical Recognition of Handwritten Digits".

    It is by E. Alpaydin and C. Kaynak, from the UCI Machine Learning Repository, CC BY 4.0.
    scikit-learn has it as well, in the same order. The test images are those that its
    `train_test_split` chooses with `test_size=360`, stratified, and `random_state=0`.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        return Digits(file["pixels"], file["labels"].astype(int), file["is_test"])
