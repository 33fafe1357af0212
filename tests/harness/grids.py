"""Cases of several parameters: all of them for ``make test-all``, every pair of values for ``make test``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of the values, those slow that are not needed for each pair of two axes' values to occur.

    With two axes it is each value. The first axis has the most values.
    """
    period = max(len(axis) for axis in axes[1:])
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        cases.append(pytest.param(*values, marks=[pytest.mark.slow] if sum(places) % period else []))
    return cases
