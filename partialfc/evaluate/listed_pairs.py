"""Verification on listed pairs (``pairs.csv``): cosines, and LFW's accuracy over folds.

Accuracy follows Huang et al., "Labeled Faces in the Wild" (2007), as InsightFace computes it: a pair counts as the same
if its squared distance 2 − 2·cosine is below a threshold of 0, 0.01 … 3.99; each fold uses the smallest threshold that
is best on all other folds; the result is the mean over the folds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from partialfc.data.pairs import PairList
from partialfc.evaluate.verification import Scores, histogram

_THRESHOLDS = np.arange(0, 4, 0.01)  # of squared distances
_ROWS = 8192  # pairs compared at once


def cosines_of_pairs(
    embeddings: Tensor, pairs: PairList, interrupted: Callable[[], bool] = lambda: False
) -> npt.NDArray[np.float64]:
    """Return the cosine of each pair, float64 [pairs]. With a process group a collective: the ranks share the work.

    Args:
        embeddings: [N, D], unit length.
        interrupted: called now and then; once it returns True, the rest is skipped and the result is useless.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = torch.zeros(len(pairs), dtype=torch.float64, device=embeddings.device)
    for start in range(rank * _ROWS, len(pairs), world_size * _ROWS):  # the same parts at any number of ranks
        if interrupted():
            break
        part = slice(start, start + _ROWS)
        first, second = (
            embeddings[torch.from_numpy(side[part]).to(embeddings.device)] for side in (pairs.first, pairs.second)
        )
        found[part] = (first.double() * second.double()).sum(dim=1)
    if dist.is_initialized():
        dist.all_reduce(found)
    return found.cpu().numpy()


def scores_of_pairs(cosines: npt.NDArray[np.float64], same: npt.NDArray[np.bool_]) -> Scores:
    """Return the histograms of genuine and impostor pairs' cosines."""
    genuine, impostors = (histogram(torch.from_numpy(cosines[kind])) for kind in (same, ~same))
    return Scores(genuine, impostors)


def fold_accuracies(
    cosines: npt.NDArray[np.float64], same: npt.NDArray[np.bool_], folds: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return the accuracy on each fold, [folds], at the threshold that is best on all others.

    Args:
        cosines: [pairs].
        same: [pairs].
        folds: [pairs], counted from 0 without gaps; two at least.
    """
    count = int(folds.max()) + 1
    # The first threshold that accepts a pair; none may.
    accepted_from = np.searchsorted(_THRESHOLDS, 2.0 - 2.0 * cosines, side="right")
    cells = folds * (len(_THRESHOLDS) + 1) + accepted_from
    genuine, impostors = (
        np.bincount(cells[kind], minlength=count * (len(_THRESHOLDS) + 1)).reshape(count, -1)[:, :-1].cumsum(axis=1)
        for kind in (same, ~same)
    )
    sizes = np.bincount(folds, minlength=count)
    correct = genuine - impostors + np.bincount(folds[~same], minlength=count)[:, None]  # [folds, thresholds]
    best = (correct.sum(axis=0) - correct).argmax(axis=1)
    found: npt.NDArray[np.float64] = correct[np.arange(count), best] / sizes
    return found
