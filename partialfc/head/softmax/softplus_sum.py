"""``Σ_j w_j·softplus(z_j)`` over the negatives j of each sample: each is a separate loss (UCE)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.softmax.class_chunks import Chunk, ClassChunks, LogitGrads, Logits
from partialfc.head.softmax.reduction import CombinedNegatives, NegativesBackward, NegativesForward


def softplus_sum(chunks: ClassChunks, wants_grad: bool, keep: bool) -> SoftplusForward:
    """Sum this shard's negatives.

    Args:
        chunks: the shard's classes.
        wants_grad: sum the embeddings' gradient too.
        keep: keep derivatives for backward, as many as the memory budget holds.
    """
    x = chunks.unit_embeddings
    sums = torch.zeros(len(x), 2, dtype=torch.float64, device=x.device)
    embedding_grad = torch.zeros_like(x)
    kept: list[Tensor] = []
    for chunk in chunks:
        keep_this = keep and wants_grad and chunk.index < chunks.chunks_to_keep
        logits = chunks.logits(chunk, keep_this)
        terms = torch.logaddexp(logits.values, logits.values.new_zeros(()))
        derivatives = _derivatives(chunks, chunk, logits)
        log_weight = chunks.log_weight(chunk)
        sums[:, 0] += (terms if log_weight is None else terms.mul_(log_weight.exp())).sum(dim=1)
        sums[:, 1] += derivatives.sum(dim=1)
        if wants_grad:
            grads = chunks.logit_grads(logits, derivatives)
            chunks.add_embedding_grad(chunk, grads, embedding_grad)
            if keep_this:
                kept.append(grads.by_cosine.values)
    return SoftplusForward(chunks, sums, embedding_grad, None, tuple(kept))


@dataclass(frozen=True)
class SoftplusForward(NegativesForward):
    """Statistics: Σ w_j·softplus(z_j) and its derivative Σ w_j·σ(z_j). Kept are the derivatives."""

    def combine(self, sample_stats: Tensor) -> CombinedNegatives:
        value, offset_grad = sample_stats[:, 0].clone(), sample_stats[:, 1].clone()
        return CombinedSoftplus(self.chunks, value, offset_grad, torch.ones_like(value))


@dataclass(frozen=True)
class CombinedSoftplus(CombinedNegatives):
    """A sum of losses: its derivatives on one shard do not depend on the other shards."""

    def backward(self, value_grad: Tensor, logit_sum_grad: Tensor | None) -> NegativesBackward:
        return SoftplusBackward(self.chunks, value_grad.to(self.chunks.unit_embeddings.dtype))


@dataclass(frozen=True)
class SoftplusBackward(NegativesBackward):
    """``logit_grads`` are w_j·σ(z_j)."""

    def logit_grads(self, chunk: Chunk, kept: tuple[Tensor, ...]) -> LogitGrads:
        if chunk.index < len(kept):
            return self.chunks.kept_grads(kept[chunk.index])
        logits = self.chunks.logits(chunk)
        return self.chunks.logit_grads(logits, _derivatives(self.chunks, chunk, logits))


def _derivatives(chunks: ClassChunks, chunk: Chunk, logits: Logits) -> Tensor:
    """Turn logits into w_j·σ(z_j), in place."""
    derivatives = logits.values.sigmoid_()
    log_weight = chunks.log_weight(chunk)
    return derivatives if log_weight is None else derivatives.mul_(log_weight.exp())
