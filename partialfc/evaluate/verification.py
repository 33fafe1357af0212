"""Open-set verification: TAR at FAR over all pairs.

A pair is *genuine* if both samples belong to one class, else an *impostor*. TAR (FAR) is the share of genuine
(impostor) pairs whose cosine reaches the threshold. Cosines are counted in a histogram of 2^20 bins over [-1, 1], so
any number of pairs fits and ranks add up their counts; a threshold is a bin's edge (steps of 2e-6 in cosine).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from partialfc.evaluate.protocol import Protocol

_BINS = 1 << 20
_ROWS = 256  # probes compared at once


@dataclass(frozen=True)
class Scores:
    """Histograms of cosines from -1 to 1, [bins] int64 each."""

    genuine: Tensor
    impostors: Tensor

    def tar_at_far(self, far: float) -> tuple[float, float]:
        """Return the largest TAR at which FAR is at most ``far``, and its threshold.

        NaN if there are fewer than 1/far impostors: such a rate is indistinguishable from zero.
        """
        impostors, genuine = int(self.impostors.sum()), int(self.genuine.sum())
        if impostors * far < 1 or not genuine:
            return math.nan, math.nan
        accepted = self.impostors.flip(0).cumsum(0).flip(0)  # impostors at or above each edge
        lowest = int((accepted > math.floor(impostors * far + 1e-9)).sum())  # first edge with few enough
        return int(self.genuine[lowest:].sum()) / genuine, lowest * 2.0 / _BINS - 1.0

    def spread(self) -> dict[str, float]:
        """Return mean and standard deviation of the genuine and of the impostor pairs' cosines; NaN without pairs.

        They show how close the samples of a class lie to each other, and how far apart the classes.
        """
        found = {}
        for name, counts in (("genuine", self.genuine), ("impostor", self.impostors)):
            cosines = (torch.arange(_BINS, dtype=torch.float64, device=counts.device) + 0.5) * (2.0 / _BINS) - 1.0
            share = counts.double() / counts.sum()
            mean = (share * cosines).sum()
            found[f"{name}_cosine"] = float(mean)
            found[f"{name}_deviation"] = float((share * (cosines - mean).square()).sum().sqrt())
        return found

    def roc(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return FAR and TAR at every threshold at which FAR changes, FAR ascending."""
        false = self.impostors.flip(0).cumsum(0).cpu().numpy()
        true = self.genuine.flip(0).cumsum(0).cpu().numpy()
        steps = np.flatnonzero(np.diff(false, append=false[-1] + 1))
        return false[steps] / max(1, false[-1]), true[steps] / max(1, true[-1])

    def roc_points(self, max_points: int = 200) -> dict[str, list[float]]:
        """Return ``far`` and ``tar`` at up to ``max_points`` points of the curve, evenly spread over log FAR."""
        far, tar = self.roc()
        far, tar = far[far > 0], tar[far > 0]
        if not len(far):
            return {"far": [], "tar": []}
        chosen = np.searchsorted(far, np.geomspace(far[0], far[-1], max_points)).clip(max=len(far) - 1)
        chosen = np.unique(chosen)
        return {"far": far[chosen].tolist(), "tar": tar[chosen].tolist()}


def histogram(cosines: Tensor) -> Tensor:
    """Return how many of some cosines [n] lie in each bin, [bins] int64."""
    bins = ((cosines + 1.0) * (_BINS / 2)).long().clamp_(0, _BINS - 1)
    return torch.bincount(bins, minlength=_BINS)


def score_pairs(
    embeddings: Tensor,
    labels: Tensor,
    designs: Sequence[str],
    protocol: Protocol,
    look_alikes: Sequence[tuple[int, int]] = (),
    interrupted: Callable[[], bool] = lambda: False,
) -> Scores:
    """Count the cosines of a protocol's pairs. With a process group a collective: the ranks share the work.

    Args:
        embeddings: [N, D], unit length.
        labels: [N] int64.
        designs: N names, which decide if a sample is a probe, in the gallery, or both. A pair counts once; no sample is
            compared with itself.
        look_alikes: pairs of classes to leave out.
        interrupted: called now and then; once it returns True, the rest is skipped and the result is useless.
    """
    device = embeddings.device
    is_probe, is_gallery = (torch.from_numpy(side).to(device) for side in protocol.sides(designs))
    probes, gallery = is_probe.nonzero()[:, 0], is_gallery.nonzero()[:, 0]
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    left_out = _pair_codes(look_alikes, labels)
    genuine = torch.zeros(_BINS, dtype=torch.int64, device=device)
    impostors = torch.zeros_like(genuine)
    for start in range(rank * _ROWS, len(probes), world_size * _ROWS):
        rows = probes[start : start + _ROWS]
        if not len(gallery) or interrupted():
            break
        cosines = embeddings[rows] @ embeddings[gallery].T
        # A pair that occurs in both orders counts where the probe comes first.
        both_orders = is_gallery[rows][:, None] & is_probe[gallery]
        counted = ~both_orders | (rows[:, None] < gallery)
        same = labels[rows][:, None] == labels[gallery]
        genuine += histogram(cosines[same & counted])
        other = ~same & counted
        if len(left_out):
            low = torch.minimum(labels[rows][:, None], labels[gallery])
            high = torch.maximum(labels[rows][:, None], labels[gallery])
            other &= ~torch.isin(low * (int(labels.max()) + 1) + high, left_out)
        impostors += histogram(cosines[other])
    if dist.is_initialized():
        dist.all_reduce(genuine)
        dist.all_reduce(impostors)
    return Scores(genuine, impostors)


def _pair_codes(pairs: Sequence[tuple[int, int]], labels: Tensor) -> Tensor:
    """Return one int64 for each unordered pair of classes."""
    classes = int(labels.max()) + 1 if len(labels) else 1
    codes = [min(pair) * classes + max(pair) for pair in pairs if max(pair) < classes]
    return torch.tensor(codes, dtype=torch.int64, device=labels.device)
