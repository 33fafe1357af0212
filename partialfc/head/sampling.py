"""Which classes take part in a step (Partial FC, An et al., CVPR 2022, arXiv:2203.15565, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.head.hashing import hash64, stream_key

_NEGATIVES = 1  # the purpose that tells this stream of random numbers from the others


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
