"""Lists of sampled rows, of a length that the host knows without asking the device.

How many rows a step has is known to the device alone: to make a list of just that length, the host would have to wait.
The number of a random sample is known beforehand but for chance, and that of the batch's own classes is at most the
batch, so a slightly longer list holds them all. What is left over at its end repeats the last row, with gradient 0:
that is no change to a sum of gradients, whoever forms it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The bounds of a sample's size fail with a probability below exp(−50) = 2e-22 a step.
_CERTAINTY = 50.0
# Most places that may be left over, by the expected number of rows: where more would be, work on them would cost more
# than a wait does.
_MOST_SPARE = 0.25


@dataclass(frozen=True)
class ListSize:
    """Size of a list of sampled rows and of those of a batch."""

    start: int  # all places up to this one, itself included, hold rows of their own
    places: int
    batch: int  # places for rows of the batch, among them


@dataclass(frozen=True)
class Padding:
    """The places at the end of a list of sorted rows that are left over. They repeat the last row."""

    size: ListSize
    sample: object  # equal for lists that hold the same random sample
    used: Tensor  # [] int64: number of places that hold rows of their own
    unused: Tensor  # [size.places − start] bool: left over, of the places from ``start`` on
    fits: Tensor  # [] bool: the list holds all rows, and as many as it should

    @property
    def start(self) -> int:
        """The first place after which there may be such places."""
        return self.size.start


def list_size(classes: int, rate: float, batch: int) -> ListSize | None:
    """Return the size of a list for a random sample of ``classes`` rows and those of the samples of a batch.

    Args:
        classes: each in the sample with probability ``rate``, independently.
        rate: in (0, 1].
        batch: number of samples.

    Returns:
        None if too large a part of the list could be left over.
    """
    expected, places = classes * rate, most_rows(classes, rate, batch) + 1
    if places - expected > _MOST_SPARE * expected or places >= classes:
        return None
    return ListSize(math.floor(expected - _deviation(classes, rate)), places, batch)


def most_rows(classes: int, rate: float, batch: int) -> int:
    """Return the most rows of a random sample of ``classes`` and those of a batch, as for :func:`list_size`."""
    return min(classes, math.ceil(classes * rate + _deviation(classes, rate)) + batch)


def _deviation(classes: int, rate: float) -> float:
    """Return how far the size of a sample may be from what is expected, after Bernstein's inequality."""
    variance = classes * rate * (1.0 - rate)
    return _CERTAINTY / 3.0 + math.sqrt((_CERTAINTY / 3.0) ** 2 + 2.0 * _CERTAINTY * variance)


def list_rows(chosen: Tensor, size: ListSize, sample: object) -> tuple[Tensor, Padding]:
    """Return the positions of the true values of ``chosen`` [rows] bool, sorted, in a list [size.places] int64.

    Their number must lie in (size.start, size.places); :attr:`Padding.fits` says whether it does. For ``sample``, see
    :class:`Padding`.
    """
    rows = torch.nonzero_static(chosen, size=size.places, fill_value=-1)[:, 0]
    end = rows[size.start :]
    unused = end < 0
    end.masked_fill_(unused, end.max())
    return rows, Padding(size, sample, size.places - unused.sum(), unused, unused[-1] & ~unused[0])
