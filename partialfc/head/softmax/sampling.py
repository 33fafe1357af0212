"""Sampling of the classes that take part in a step.

Partial FC, An et al., CVPR 2022, arXiv:2203.15565, section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.random import RandomStream, hash64, stream_key


@dataclass(frozen=True)
class OwnedSamples:
    """The n samples of the global batch whose class this shard owns."""

    samples: Tensor  # [n] int64, positions in the gathered batch
    rows: Tensor  # [n] int64, the rows of their classes in this shard


@dataclass(frozen=True)
class ActiveRows:
    """The A classes of this shard that take part in a step."""

    rows: Tensor | None  # [A] int64 sorted, counted from the shard's first class; None: all of them
    count: int  # A
    log_weight: Tensor | None = None  # [A]: log of a class's weight as a negative (corrected sampling)
    largest_log_weight: float = 0.0

    def index(self, rows: Tensor) -> Tensor:
        """Return the positions among the active rows of some ``rows`` of the shard that are active."""
        return rows if self.rows is None else torch.searchsorted(self.rows, rows)


def owned_samples(labels: Tensor, start: int, stop: int) -> OwnedSamples:
    """Find the samples whose label, of ``labels`` [B] int64, lies in this shard, the classes [start, stop)."""
    samples = ((labels >= start) & (labels < stop)).nonzero().flatten()
    return OwnedSamples(samples, labels[samples] - start)


def active_rows(
    positives: Tensor, start: int, stop: int, rate: float, seed: int, step: int, correct: bool, dtype: torch.dtype
) -> ActiveRows:
    """Return the rows of the shard [start, stop) that take part: all, or the batch's classes and sampled negatives.

    Args:
        positives: [n] int64, rows of this shard whose class is in the batch; may repeat.
        start, stop: classes of this shard.
        rate: sample rate, in (0, 1].
        seed, step: of the sample.
        correct: give a class that was sampled but is not in the batch the weight 1/rate.
        dtype: of the log weights.
    """
    if rate >= 1.0:
        return ActiveRows(None, stop - start)
    negatives = sampled_negatives(start, stop, rate, seed, step, positives.device)
    active = merge_rows(negatives, positives)
    if not correct:
        return ActiveRows(active, len(active))
    log_weight = torch.full((len(active),), -math.log(rate), dtype=dtype, device=positives.device)
    log_weight[torch.searchsorted(active, positives)] = 0.0
    return ActiveRows(active, len(active), log_weight, -math.log(rate))


def sampled_negatives(
    start: int, stop: int, rate: float, seed: int, step: int, device: torch.device | str = "cpu", piece: int = 1 << 16
) -> Tensor:
    """Sample negatives among the classes [start, stop): sorted rows [n] int64, counted from ``start``.

    Class c is sampled iff hash(seed, step, c) falls into the lowest ``rate`` of all hashes: each with probability
    ``rate``, independently of all others and of the rank that asks. Walks the classes in pieces of ``piece`` integers.
    """
    key = stream_key(seed, RandomStream.NEGATIVES, step)
    threshold = min(int(rate * 2.0**64), (1 << 64) - 1) - (1 << 63)
    sampled = []
    for first in range(start, stop, piece):
        ids = torch.arange(first, min(first + piece, stop), dtype=torch.int64, device=device)
        sampled.append((hash64(key, ids) < threshold).nonzero().flatten().add_(first - start))
    return torch.cat(sampled) if sampled else torch.empty(0, dtype=torch.int64, device=device)


def merge_rows(negatives: Tensor, positives: Tensor) -> Tensor:
    """Return the sorted union of sampled ``negatives`` and the batch's ``positives`` (int64; positives may repeat)."""
    return torch.unique(torch.cat((negatives, positives)))
