"""What the negatives of a sample add up to, over the chunks of a shard and over the shards.

Softmax losses need ``log Σ_j exp(z_j)``. Others take each negative as a loss of its own, ``Σ_j softplus(z_j)``. Either
way the forward pass also sums the classes' directions, each times the derivative by its cosine: up to factors that are
known once the shards are combined, that is the embeddings' gradient. So backward can send it off at once and compute
the rows' gradient while it travels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.collectives import Collectives
from partialfc.head.softmax.class_chunks import Chunk, ClassChunks, Logits

# Largest exponent whose exponentials, their sums over 1e9 rows and the reciprocals of these stay normal numbers.
_SAFE_EXPONENT = {torch.float32: 66.0, torch.float64: 680.0}
# Largest local log-sum-exp, in absolute value, that shards may exchange as a plain sum of exponentials in float64; it
# leaves room for the sums over rows and over shards.
_SAFE_TO_SUM = 660.0


@dataclass(frozen=True)
class Combined:
    """What all shards' negatives add up to; equal on all ranks."""

    value: Tensor  # [B] float64: log Σ exp(z_j), or Σ softplus(z_j)
    offset_slope: Tensor  # [B]: its derivative by a number that is added to all logits
    logit_sum: Tensor | None = None  # [B] Σ z_j, where the loss needs the mean logit
    count: Tensor | None = None  # [B] how many terms that has


class LogSumExp:
    """``log Σ_j w_j·exp(z_j)`` over the negatives j of each sample; w is 1, or that of corrected sampling.

    Args:
        chunks: the shard's classes.
        with_mean_logit: whether to sum the logits themselves as well.
    """

    def __init__(self, chunks: ClassChunks, with_mean_logit: bool) -> None:
        self.chunks, self.with_mean_logit = chunks, with_mean_logit
        x = chunks.embeddings
        self.kept: list[Tensor] = []  # exponentials of the first chunks, as many as the memory budget holds
        self._sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)  # Σ exp(z_j − shift)
        self._shift = torch.zeros_like(self._sums)
        #: Σ exp(z_j − shift)·(dz_j/dcos_j)·w_j, up to chunks.slope
        self._pull = torch.zeros_like(x)
        self._logit_sum = torch.zeros_like(self._sums)
        self._count = torch.zeros_like(self._sums)
        self._mean_pull = torch.zeros_like(x) if with_mean_logit else None  # Σ (dz_j/dcos_j)·w_j, up to the same

    def sum_shard(self, wants_grad: bool, keep: bool) -> None:
        """Walk this shard's chunks. ``keep``: remember exponentials for backward."""
        if self.chunks.logit_bound() <= _SAFE_EXPONENT[self.chunks.embeddings.dtype]:
            # With the logits' mean, backward needs to know which negatives were left out: an exponential cannot tell.
            self._sum_as_they_are(wants_grad, keep and not self.with_mean_logit)
        else:
            self._sum_below_running_maximum(wants_grad)

    def _sum_as_they_are(self, wants_grad: bool, keep: bool) -> None:
        for chunk in self.chunks:
            keep_this = keep and wants_grad and chunk.index < self.chunks.chunks_to_keep
            logits = self._weighted(chunk, self.chunks.logits(chunk, keep_this), wants_grad)
            exponentials = logits.values.exp_()
            self._sums += exponentials.sum(dim=1)
            if wants_grad:
                self._add_pull(chunk, exponentials, logits)
                if keep_this:
                    self.kept.append(exponentials)

    def _sum_below_running_maximum(self, wants_grad: bool) -> None:
        x = self.chunks.embeddings
        running = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        for chunk in self.chunks:
            logits = self._weighted(chunk, self.chunks.logits(chunk), wants_grad)
            maximum = torch.maximum(running, logits.values.amax(dim=1))
            reference = maximum.masked_fill(torch.isneginf(maximum), 0.0)
            rescale = torch.exp(running - reference)
            exponentials = logits.values.sub_(reference[:, None]).exp_()
            self._sums.mul_(rescale).add_(exponentials.sum(dim=1))
            if wants_grad:
                self._pull.mul_(rescale[:, None])
                self._add_pull(chunk, exponentials, logits)
            running = maximum
        self._shift = running.masked_fill_(torch.isneginf(running), 0.0).double()

    def _weighted(self, chunk: Chunk, logits: Logits, wants_grad: bool) -> Logits:
        """Add the classes' log weights to the logits, in place; sum the logits themselves before."""
        log_weight = self.chunks.log_weight(chunk)
        if self._mean_pull is not None:
            present = self._weight_of_each(logits.values, log_weight)
            self._count += present.sum(dim=1).double()
            values = logits.values.masked_fill(torch.isneginf(logits.values), 0.0)
            self._logit_sum += torch.linalg.vecdot(values, present).double()
            if wants_grad:
                self.chunks.pull(chunk, present, logits.nearest, self._mean_pull)
        if log_weight is not None:
            logits.values.add_(log_weight)
        return logits

    @staticmethod
    def _weight_of_each(logits: Tensor, log_weight: Tensor | None) -> Tensor:
        """[B, n]: the weight of each negative that is not left out, 0 for the others."""
        present = (~torch.isneginf(logits)).to(logits.dtype)
        return present if log_weight is None else present.mul_(log_weight.exp())

    def _add_pull(self, chunk: Chunk, exponentials: Tensor, logits: Logits) -> None:
        coefficients = exponentials if logits.slopes is None else exponentials * logits.slopes
        self.chunks.pull(chunk, coefficients, logits.nearest, self._pull)

    def columns(self, collectives: Collectives) -> Tensor:
        """What this shard contributes, [B, k] float64, to be summed over ranks."""
        bound = self.chunks.logit_bound()
        if math.isinf(bound):  # agree on a maximum first
            self._centers = collectives.maximum(torch.where(self._sums > 0, self._shift, -torch.inf))[:, None]
            self._centers = self._centers.masked_fill(torch.isneginf(self._centers), 0.0)
            columns = (self._sums * torch.exp(self._shift - self._centers[:, 0]))[:, None]
        else:
            columns = self._in_buckets(bound)
        if self._mean_pull is None:
            return columns
        return torch.cat((columns, self._logit_sum[:, None], self._count[:, None]), dim=1)

    def _in_buckets(self, bound: float) -> Tensor:
        """exp of logits beyond ±660 may not fit float64: there the range is cut into buckets of that half width, each
        shard's sum goes into the one that holds its logarithm, relative to the bucket's center. No maximum has to
        travel before.
        """
        buckets = max(1, math.ceil(bound / _SAFE_TO_SUM))
        steps = torch.arange(buckets, dtype=torch.float64, device=self._sums.device)
        self._centers = (_SAFE_TO_SUM * (2.0 * steps - (buckets - 1)))[None]  # [1, buckets]
        if buckets == 1:
            return (self._sums * torch.exp(self._shift))[:, None]
        lse = self._shift + torch.log(self._sums)
        bucket = torch.round((lse.clamp_min(-1e9) - self._centers[0, 0]) / (2.0 * _SAFE_TO_SUM))
        bucket = bucket.nan_to_num(0.0).clamp(0, buckets - 1).long()[:, None]
        centers = self._centers[0][bucket[:, 0]]
        columns = torch.zeros(len(lse), buckets, dtype=torch.float64, device=lse.device)
        return columns.scatter_(1, bucket, (self._sums * torch.exp(self._shift - centers))[:, None])

    def combine(self, columns: Tensor) -> Combined:
        """The negatives of all shards, from the summed ``columns``."""
        logit_sum = count = None
        if self._mean_pull is not None:
            columns, logit_sum, count = columns[:, :-2], columns[:, -2], columns[:, -1]
        self._lse = torch.logsumexp(torch.log(columns) + self._centers, dim=1)
        self._exists = ~torch.isneginf(self._lse)
        # exp(z − shift)·ratio = exp(z − lse), the probability of a negative among the negatives
        self._ratio = torch.where(self._exists, torch.exp(self._shift - self._lse), 0.0)
        return Combined(self._lse, torch.ones_like(self._lse), logit_sum, count)

    def embedding_pull(self, slope: Tensor, logit_sum_slope: Tensor | None) -> Tensor:
        """Σ_j ∂loss/∂cos_j·w_j over this shard's negatives, [B, D] (∂w·x instead of ∂cos for raw logits).

        Args:
            slope: [B] ∂loss/∂value.
            logit_sum_slope: [B] ∂loss/∂logit_sum, or None.
        """
        pull = self._pull.mul_((self._ratio * slope * self.chunks.slope)[:, None])
        if self._mean_pull is not None and logit_sum_slope is not None:
            pull.add_(self._mean_pull.mul_((logit_sum_slope * self.chunks.slope)[:, None]))
        self._slope, self._logit_sum_slope = slope, logit_sum_slope
        self._pull, self._mean_pull = pull.new_empty(0), None  # neither is needed any more
        return pull

    def start_backward(self, grad_loss: Tensor) -> Tensor:
        """[B]: what the coefficients of each sample are still to be multiplied by."""
        dtype = self.chunks.embeddings.dtype
        self._reference = self._lse.masked_fill(~self._exists, 0.0).to(dtype)[:, None]
        self._kept_ratio = self._ratio.to(dtype)[:, None]
        slope = (self._slope * grad_loss).to(dtype)
        if self._logit_sum_slope is None:
            return slope
        self._slopes = slope[:, None], (self._logit_sum_slope * grad_loss).to(dtype)[:, None]
        return torch.ones_like(slope)

    def coefficients(self, chunk: Chunk, kept: list[Tensor]) -> tuple[Tensor, Logits]:
        """∂loss/∂z_j of a chunk's negatives, [B, n], up to the factors above; and the logits, for their slopes."""
        if chunk.index < len(kept):
            found = torch.mul(kept[chunk.index], self._kept_ratio, out=self.chunks.logits_buffer(chunk))
            return found, Logits(found, None, None)
        logits = self.chunks.logits(chunk)
        log_weight = self.chunks.log_weight(chunk)
        present = None if self._logit_sum_slope is None else self._weight_of_each(logits.values, log_weight)
        if log_weight is not None:
            logits.values.add_(log_weight)
        found = logits.values.sub_(self._reference).exp_()  # the probability of each negative among the negatives
        if present is not None:
            found.mul_(self._slopes[0]).add_(present.mul_(self._slopes[1]))
        return found, logits


class SoftplusSum:
    """``Σ_j w_j·softplus(z_j)`` over the negatives j of each sample: each is a loss of its own (UCE).

    The same interface as :class:`LogSumExp`.
    """

    def __init__(self, chunks: ClassChunks) -> None:
        self.chunks = chunks
        x = chunks.embeddings
        self.kept: list[Tensor] = []  # derivatives σ(z_j) of the first chunks, as many as the memory budget holds
        self._sums = torch.zeros(len(x), 2, dtype=torch.float64, device=x.device)  # Σ softplus(z_j), Σ σ(z_j)
        self._pull = torch.zeros_like(x)

    def sum_shard(self, wants_grad: bool, keep: bool) -> None:
        for chunk in self.chunks:
            keep_this = keep and wants_grad and chunk.index < self.chunks.chunks_to_keep
            logits = self.chunks.logits(chunk, keep_this)
            terms = torch.logaddexp(logits.values, logits.values.new_zeros(()))
            derivatives = self._derivatives(chunk, logits)
            log_weight = self.chunks.log_weight(chunk)
            self._sums[:, 0] += (terms if log_weight is None else terms.mul_(log_weight.exp())).sum(dim=1)
            self._sums[:, 1] += derivatives.sum(dim=1)
            if wants_grad:
                by_cosine = derivatives if logits.slopes is None else derivatives * logits.slopes
                self.chunks.pull(chunk, by_cosine, logits.nearest, self._pull)
                if keep_this:
                    self.kept.append(derivatives)

    def _derivatives(self, chunk: Chunk, logits: Logits) -> Tensor:
        derivatives = logits.values.sigmoid_()
        log_weight = self.chunks.log_weight(chunk)
        return derivatives if log_weight is None else derivatives.mul_(log_weight.exp())

    def columns(self, collectives: Collectives) -> Tensor:
        return self._sums

    def combine(self, columns: Tensor) -> Combined:
        return Combined(columns[:, 0].clone(), columns[:, 1].clone())

    def embedding_pull(self, slope: Tensor, logit_sum_slope: Tensor | None) -> Tensor:
        pull = self._pull.mul_((slope * self.chunks.slope)[:, None])
        self._slope, self._pull = slope, pull.new_empty(0)
        return pull

    def start_backward(self, grad_loss: Tensor) -> Tensor:
        return (self._slope * grad_loss).to(self.chunks.embeddings.dtype)

    def coefficients(self, chunk: Chunk, kept: list[Tensor]) -> tuple[Tensor, Logits]:
        if chunk.index < len(kept):
            return kept[chunk.index], Logits(kept[chunk.index], None, None)
        logits = self.chunks.logits(chunk)
        return self._derivatives(chunk, logits), logits
