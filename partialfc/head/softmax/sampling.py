"""Which classes take part in a step (Partial FC, An et al., CVPR 2022, arXiv:2203.15565, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.random import hash64, stream_key

_NEGATIVES = 1  # the purpose that tells this stream of random numbers from the others


@dataclass(frozen=True)
class ActiveRows:
    """The classes of this shard that take part in a step."""

    rows: Tensor | None  # [A] int64 sorted, counted from the shard's first class; None: all of them
    count: int  # A
    log_weight: Tensor | None = None  # [A]: log of a class's weight as a negative (corrected sampling)
    largest_log_weight: float = 0.0


def active_rows(
    labels: Tensor, start: int, stop: int, rate: float, seed: int, step: int, correct: bool, dtype: torch.dtype
) -> ActiveRows:
    """The rows of the shard [start, stop) that take part: all, or the batch's classes and the step's negatives.

    With ``correct`` a class that was drawn but is not in the batch (``labels`` [B]) weighs 1/rate, in ``dtype``.
    """
    if rate >= 1.0:
        return ActiveRows(None, stop - start)
    negatives = sampled_negatives(start, stop, rate, seed, step, labels.device)
    positives = labels[(labels >= start) & (labels < stop)] - start
    active = merge_rows(negatives, positives)
    if not correct:
        return ActiveRows(active, len(active))
    log_weight = torch.full((len(active),), -math.log(rate), dtype=dtype, device=labels.device)
    log_weight[torch.searchsorted(active, positives)] = 0.0
    return ActiveRows(active, len(active), log_weight, -math.log(rate))


def sampled_negatives(
    start: int, stop: int, rate: float, seed: int, step: int, device: torch.device | str = "cpu", piece: int = 1 << 16
) -> Tensor:
    """The classes of [start, stop) drawn as negatives in ``step``, as sorted row numbers counted from ``start``.

    Class c is drawn iff hash(seed, step, c) falls into the lowest ``rate`` of all hashes: each with probability
    ``rate``, independently of all others, and of which rank asks. Walks the classes in pieces of ``piece`` integers.
    """
    key = stream_key(seed, _NEGATIVES, step)
    threshold = min(int(rate * 2.0**64), (1 << 64) - 1) - (1 << 63)
    drawn = []
    for first in range(start, stop, piece):
        ids = torch.arange(first, min(first + piece, stop), dtype=torch.int64, device=device)
        drawn.append((hash64(key, ids) < threshold).nonzero().flatten().add_(first - start))
    return torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.int64, device=device)


def merge_rows(negatives: Tensor, positives: Tensor) -> Tensor:
    """The sorted union of sampled ``negatives`` and the batch's ``positives`` (int64; positives may repeat)."""
    return torch.unique(torch.cat((negatives, positives)))
