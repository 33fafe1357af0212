"""Closed-set identification: the known class nearest to an embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.head import PartialFC


@torch.no_grad()
def nearest_classes(head: PartialFC, embeddings: Tensor, classes_per_chunk: int = 8192, rows: int = 1024) -> Tensor:
    """Return the class with the highest logit over all shards for each embedding, [N] int64. A collective.

    For every loss but plain Softmax, that is the class with the highest cosine.

    Args:
        embeddings: [N, D], not normalised, the same on every rank.
        classes_per_chunk: classes per block of logits.
        rows: embeddings per block of logits.
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
            block = slice(first, first + rows)
            logits = embeddings[block].to(weight.dtype) @ weight.flatten(0, -2).T
            if weight.dim() == 3:  # the best of each class's sub-centers
                logits = logits.unflatten(1, weight.shape[:2]).amax(dim=2)
            if head.bias is not None:
                logits += head.bias[start : start + classes_per_chunk]
            value, column = logits.max(dim=1)
            better = value.double() > best[block]
            best[block] = torch.where(better, value.double(), best[block])
            found[block] = torch.where(better, column + start + head.first_class, found[block])
    highest = head.collectives.maximum(best.clone())
    # Among equally high logits the lowest class wins: the maximum of negated ids.
    candidates = torch.where(best == highest, -found.double(), -float(head.num_classes))
    return (-head.collectives.maximum(candidates)).long()
