"""Parameters of tests, of which only some run every day."""

from collections.abc import Collection, Mapping
from typing import Any

import pytest


def daily(names: Collection[str], cases: Mapping[str, Any]) -> list:
    """Returns the cases for `parametrize`; those without one of these names are `long`."""
    assert cases.keys() >= set(names)
    return [
        pytest.param(case, id=name, marks=() if name in names else pytest.mark.long)
        for name, case in cases.items()
    ]
