"""Closed-set identification: which of the known classes is it?"""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.head import PartialFC


@torch.no_grad()
def nearest_classes(head: PartialFC, embeddings: Tensor, classes_per_chunk: int = 8192, rows: int = 1024) -> Tensor:
    """The class with the highest logit for each of ``embeddings [N, D]``, over all shards, [N] int64. A collective.

    Every rank passes the same embeddings, not normalised. But for plain Softmax the highest logit is that of the
    highest cosine.
    """
    device = head.weight.device
    best = torch.full((len(embeddings),), -torch.inf, dtype=torch.float64, device=device)
    found = torch.full((len(embeddings),), head.num_classes, dtype=torch.int64, device=device)
    raw = head.loss.raw_logits
    head.apply_deferred_decay()
    for start in range(0, len(head.weight), classes_per_chunk):
        weight = head.weight[start : start + classes_per_chunk].to(head.compute_dtype)
        weight = weight if raw else torch.nn.functional.normalize(weight, dim=-1)
        for first in range(0, len(embeddings), rows):
            part = slice(first, first + rows)
            logits = embeddings[part].to(weight.dtype) @ weight.flatten(0, -2).T
            if weight.dim() == 3:  # the nearest of each class's sub-centers
                logits = logits.unflatten(1, weight.shape[:2]).amax(dim=2)
            if head.bias is not None:
                logits += head.bias[start : start + classes_per_chunk]
            value, column = logits.max(dim=1)
            better = value.double() > best[part]
            best[part] = torch.where(better, value.double(), best[part])
            found[part] = torch.where(better, column + start + head.first_class, found[part])
    highest = head.collectives.maximum(best.clone())
    # Of shards that share the highest logit the lowest class wins; the maximum of negated ids finds it.
    candidates = torch.where(best == highest, -found.double(), -float(head.num_classes))
    return (-head.collectives.maximum(candidates)).long()
