"""Sampling of the classes that take part in a step.

Partial FC, An et al., CVPR 2022, arXiv:2203.15565, section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.ownership import OwnedSamples
from partialfc.head.padded_rows import Padding, list_rows, list_size, most_rows
from partialfc.head.random import RandomStream, hash64, stream_key
from partialfc.head.transfers import host_waits_for

# Integers hashed at once: on a CPU as many as its caches hold, elsewhere enough to keep the device busy.
_CPU_PIECE, _GPU_PIECE = 1 << 16, 1 << 22


@dataclass(frozen=True)
class ActiveRows:
    """The classes of this shard that take part in a step, in a list of A places."""

    rows: Tensor | None  # [A] int64 sorted, counted from the shard's first class; None: all of them
    count: int  # A
    log_weight: Tensor | None = None  # [A]: log of a class's weight as a negative (corrected sampling)
    largest_log_weight: float = 0.0
    padding: Padding | None = None  # places at the end that hold no class of their own; None: there are none
    room: int = 0  # places to make room for in memory, if there are more of them in other steps

    @property
    def number(self) -> Tensor:
        """The number of classes, [] int64: on the device where the host does not know it."""
        return torch.tensor(self.count, device="cpu") if self.padding is None else self.padding.used

    def index(self, rows: Tensor) -> Tensor:
        """Return the positions of some active ``rows`` of the shard among all its active rows."""
        return rows if self.rows is None else torch.searchsorted(self.rows, rows)


def active_rows(
    owned: OwnedSamples,
    start: int,
    stop: int,
    rate: float,
    seed: int,
    step: int,
    correct: bool,
    dtype: torch.dtype,
    largest_rate: float = 0.0,
) -> ActiveRows:
    """Return the rows of the shard [start, stop) that take part: all, or the batch's classes and sampled negatives.

    Args:
        owned: the samples of the batch whose classes lie in the shard.
        start, stop: classes of this shard.
        rate: sample rate, in (0, 1].
        seed, step: of the sample.
        correct: give a class that was sampled but is not in the batch the weight 1/rate.
        dtype: of the log weights.
        largest_rate: of all steps, as far as it is known.

    On a GPU the list may have places left over; else, for a shard of few classes, the host waits for its length.
    """
    if rate >= 1.0:
        return ActiveRows(None, stop - start)
    device = owned.rows.device
    # A GPU's memory that has been divided for small buffers does not serve for larger ones: all steps have one size.
    room = most_rows(stop - start, largest_rate, len(owned.rows)) if largest_rate and host_waits_for(device) else 0
    taken = _draw(start, stop, rate, seed, step, device, spare=1)
    taken.index_fill_(0, torch.where(owned.mask, owned.rows, stop - start), True)
    # A CPU knows their number at once, and does no work on places left over.
    size = list_size(stop - start, rate, len(owned.rows)) if host_waits_for(device) else None
    if size is None:
        active, padding = taken[:-1].nonzero()[:, 0], None  # the one place where the host waits for the device
    else:
        active, padding = list_rows(taken[:-1], size, (start, stop, rate, seed, step))
    count = len(active)
    if not correct:
        return ActiveRows(active, count, padding=padding, room=room)
    log_weight = torch.full((count + 1,), -math.log(rate), dtype=dtype, device=device)
    positives = torch.where(owned.mask, torch.searchsorted(active, owned.rows), count)
    return ActiveRows(active, count, log_weight.index_fill_(0, positives, 0.0)[:-1], -math.log(rate), padding, room)


def _draw(start: int, stop: int, rate: float, seed: int, step: int, device: torch.device, spare: int) -> Tensor:
    """Return a bool for each class of [start, stop), true if it is sampled, and ``spare`` undefined ones after them.

    Class c is sampled iff hash(seed, step, c) falls into the lowest ``rate`` of all hashes: each with probability
    ``rate``, independently of all others and of the calling rank.
    """
    key = stream_key(seed, RandomStream.NEGATIVES, step)
    threshold = min(int(rate * 2.0**64), (1 << 64) - 1) - (1 << 63)
    piece = _CPU_PIECE if device.type == "cpu" else _GPU_PIECE
    sampled = torch.empty(stop - start + spare, dtype=torch.bool, device=device)
    for first in range(start, stop, piece):
        last = min(first + piece, stop)
        ids = torch.arange(first, last, dtype=torch.int64, device=device)
        torch.lt(hash64(key, ids), threshold, out=sampled[first - start : last - start])
    return sampled
