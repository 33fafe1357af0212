"""``log Σ_j w_j·exp(z_j)`` over the negatives j of each sample; w is 1, or the weight of corrected sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.collectives import Collectives
from partialfc.head.softmax.class_chunks import Chunk, ClassChunks, LogitGrads, Logits
from partialfc.head.softmax.reduction import CombinedNegatives, NegativesBackward, NegativesForward

# Largest exponent whose exponentials, their sums over 1e9 rows and the reciprocals of these stay normal numbers.
_SAFE_EXPONENT = {torch.float32: 66.0, torch.float64: 680.0}
# Largest |log-sum-exp| of a shard for which shards may exchange plain sums of exponentials in float64; it leaves room
# for the sums over rows and over shards.
_SAFE_TO_SUM = 660.0


def log_sum_exp(
    chunks: ClassChunks, collectives: Collectives, with_mean_logit: bool, wants_grad: bool, keep: bool
) -> LogSumExpForward:
    """Sum this shard's negatives. A collective if the logits are unbounded, or bounded beyond ±660.

    Args:
        chunks: the shard's classes.
        collectives: of the head.
        with_mean_logit: sum the logits themselves too.
        wants_grad: sum the embeddings' gradient too.
        keep: keep exponentials for backward, as many as the memory budget holds.
    """
    walk = _Walk(chunks, with_mean_logit, wants_grad)
    bound = chunks.logit_bound()
    if bound <= _SAFE_EXPONENT[chunks.unit_embeddings.dtype]:
        # For the mean logit, backward must know which negatives were left out, and an exponential does not show it.
        walk.sum_directly(keep and wants_grad and not with_mean_logit)
    else:
        walk.sum_below_running_maximum()
    reference = torch.zeros_like(walk.shift)
    if bound > _SAFE_TO_SUM:
        # exp(z) might not fit float64: the ranks agree on a maximum first.
        reference = collectives.maximum(torch.where(walk.sums > 0, walk.shift, -torch.inf))
        reference = reference.masked_fill(torch.isneginf(reference), 0.0)
    stats = [walk.sums * torch.exp(walk.shift - reference)]
    if with_mean_logit:
        stats += [walk.logit_sum, walk.count]
    return LogSumExpForward(
        chunks,
        torch.stack(stats, dim=1),
        walk.embedding_grad,
        walk.mean_embedding_grad,
        tuple(walk.kept),
        walk.shift,
        reference,
        bound <= _SAFE_EXPONENT[chunks.unit_embeddings.dtype],
    )


@dataclass(frozen=True)
class LogSumExpForward(NegativesForward):
    """Statistics: Σ w_j·exp(z_j − reference); for the mean logit also Σ w_j·z_j and Σ w_j."""

    shift: Tensor  # [B] float64; `embedding_grad` and `kept` are in terms of exp(z_j − shift)
    reference: Tensor  # [B] float64, equal on all ranks
    direct: bool  # the shift is 0

    def combine(self, sample_stats: Tensor) -> CombinedNegatives:
        lse = torch.log(sample_stats[:, 0]) + self.reference
        # exp(z − shift)·ratio = exp(z − lse), the probability of a negative among the negatives
        ratio = torch.where(torch.isneginf(lse), 0.0, torch.exp(self.shift - lse))
        logit_sum = count = None
        if self.mean_embedding_grad is not None:
            logit_sum, count = sample_stats[:, 1], sample_stats[:, 2]
        return CombinedLogSumExp(self.chunks, lse, torch.ones_like(lse), ratio, logit_sum, count, self.direct)


@dataclass(frozen=True)
class CombinedLogSumExp(CombinedNegatives):
    """``value`` is −∞ for a sample without negatives."""

    direct: bool = False  # exp(z_j) neither overflows nor vanishes

    def backward(self, value_grad: Tensor, logit_sum_grad: Tensor | None) -> NegativesBackward:
        dtype = self.chunks.unit_embeddings.dtype
        if self.direct and self.chunks.products.half and logit_sum_grad is None:
            # exp(z) without factors per sample: as good in 16 bits, and it saves passes over the logits.
            return LogSumExpBackward(self.chunks, (value_grad * self.ratio).to(dtype))
        lse = self.value.masked_fill(torch.isneginf(self.value), 0.0).to(dtype)[:, None]
        factors, ratio = value_grad.to(dtype), self.ratio.to(dtype)[:, None]
        if logit_sum_grad is None:
            return LogSumExpBackward(self.chunks, factors, lse, ratio)
        two_grads = factors[:, None], logit_sum_grad.to(dtype)[:, None]
        return LogSumExpBackward(self.chunks, torch.ones_like(factors), lse, ratio, two_grads)


@dataclass(frozen=True)
class LogSumExpBackward(NegativesBackward):
    """Without the mean logit, ``logit_grads`` are the probabilities of each negative among the negatives.

    Without ``lse`` they are exponentials, and the sample factors hold the rest.
    """

    lse: Tensor | None = None  # [B, 1]; 0 where there are no negatives
    ratio: Tensor | None = None  # [B, 1]
    grads: tuple[Tensor, Tensor] | None = None  # [B, 1] ∂loss/∂lse and ∂loss/∂logit_sum, if there is a mean logit

    def logit_grads(self, chunk: Chunk, kept: tuple[Tensor, ...]) -> LogitGrads:
        if chunk.index < len(kept):
            of_chunk = kept[chunk.index]
            if self.ratio is not None:
                of_chunk = torch.mul(of_chunk, self.ratio, out=self.chunks.logits_buffer(chunk))
            return self.chunks.kept_grads(of_chunk)
        logits = self.chunks.logits(chunk)
        log_weight = self.chunks.log_weight(chunk)
        weights = None if self.grads is None else _weights_of_negatives(logits.values, log_weight)
        if log_weight is not None:
            logits.values.add_(log_weight)
        if self.lse is None:
            return self.chunks.exp_grads(logits)
        grad = logits.values.sub_(self.lse).exp_()
        if self.grads is not None and weights is not None:
            grad.mul_(self.grads[0]).add_(weights.mul_(self.grads[1]))
        return self.chunks.logit_grads(logits, grad)


class _Walk:
    """Running sums over the chunks of a shard."""

    def __init__(self, chunks: ClassChunks, with_mean_logit: bool, wants_grad: bool) -> None:
        self.chunks, self.wants_grad = chunks, wants_grad
        x = chunks.unit_embeddings
        self.sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)  # [B] Σ w_j·exp(z_j − shift)
        self.shift = torch.zeros_like(self.sums)
        self.embedding_grad = torch.zeros_like(x)  # [B, D] Σ w_j·exp(z_j − shift)·(dz_j/dcos_j)·(unit weight of j)
        self.logit_sum = torch.zeros_like(self.sums)  # [B] Σ w_j·z_j
        self.count = torch.zeros_like(self.sums)  # [B] Σ w_j
        # [B, D] Σ w_j·(dz_j/dcos_j)·(unit weight of j)
        self.mean_embedding_grad = torch.zeros_like(x) if with_mean_logit else None
        self.kept: list[Tensor] = []

    def sum_directly(self, keep: bool) -> None:
        """Sum exponentials of logits as they are: the shift stays 0."""
        for chunk in self.chunks:
            keep_this = keep and chunk.index < self.chunks.chunks_to_keep
            logits = self._weighted_logits(chunk, keep_this)
            exponentials = logits.values.exp_()
            self.sums += exponentials.sum(dim=1)
            if self.wants_grad:
                grads = self.chunks.logit_grads(logits, exponentials)
                self.chunks.add_embedding_grad(chunk, grads, self.embedding_grad)
                if keep_this:
                    self.kept.append(grads.by_cosine.values)

    def sum_below_running_maximum(self) -> None:
        """Sum exponentials relative to the largest logit so far."""
        x = self.chunks.unit_embeddings
        running = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        for chunk in self.chunks:
            logits = self._weighted_logits(chunk)
            maximum = torch.maximum(running, logits.values.amax(dim=1))
            reference = maximum.masked_fill(torch.isneginf(maximum), 0.0)
            rescale = torch.exp(running - reference)
            exponentials = logits.values.sub_(reference[:, None]).exp_()
            self.sums.mul_(rescale).add_(exponentials.sum(dim=1))
            if self.wants_grad:
                grads = self.chunks.logit_grads(logits, exponentials)
                self.chunks.add_embedding_grad(chunk, grads, self.embedding_grad.mul_(rescale[:, None]))
            running = maximum
        self.shift = running.masked_fill_(torch.isneginf(running), 0.0).double()

    def _weighted_logits(self, chunk: Chunk, keep: bool = False) -> Logits:
        """Return logits plus the classes' log weights; sum the logits themselves before that."""
        logits = self.chunks.logits(chunk, keep)
        log_weight = self.chunks.log_weight(chunk)
        if self.mean_embedding_grad is not None:
            weights = _weights_of_negatives(logits.values, log_weight)
            self.count += weights.sum(dim=1).double()
            values = logits.values.masked_fill(torch.isneginf(logits.values), 0.0)
            self.logit_sum += torch.linalg.vecdot(values, weights).double()
            if self.wants_grad:
                grads = self.chunks.logit_grads(logits, weights)
                self.chunks.add_embedding_grad(chunk, grads, self.mean_embedding_grad)
        if log_weight is not None:
            logits.values.add_(log_weight)
        return logits


def _weights_of_negatives(logits: Tensor, log_weight: Tensor | None) -> Tensor:
    """Return the weight of each negative that is not left out, 0 for the others, [B, n]."""
    present = (~torch.isneginf(logits)).to(logits.dtype)
    return present if log_weight is None else present.mul_(log_weight.exp())
