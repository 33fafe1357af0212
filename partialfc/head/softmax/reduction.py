"""The reduction of a sample's negatives: over the chunks of a shard, then over the shards.

Softmax losses need ``log Σ_j exp(z_j)`` (:mod:`log_sum_exp`). Others treat each negative as a separate loss,
``Σ_j softplus(z_j)`` (:mod:`softplus_sum`). Either way the forward pass also sums the classes' unit weights, each times
the derivative by its cosine: up to factors known once the shards are combined, that is the embeddings' gradient.
Backward can therefore send it off at once and compute the rows' gradient meanwhile.

Each stage hands a frozen result to the next: :class:`NegativesForward` of one shard, :class:`CombinedNegatives` of all,
:class:`NegativesBackward` once the gradient of the loss is known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.softmax.class_chunks import Chunk, ClassChunks, LogitGrads


@dataclass(frozen=True)
class NegativesForward(ABC):
    """The negatives of one shard, summed."""

    chunks: ClassChunks
    sample_stats: Tensor  # [B, k] float64, to be summed over ranks
    embedding_grad: Tensor  # [B, D] Σ_j ∂value/∂cos_j·w_j, up to CombinedNegatives.ratio and chunks.cosine_grad
    mean_embedding_grad: Tensor | None  # [B, D] Σ_j ∂logit_sum/∂cos_j·w_j, up to chunks.cosine_grad
    kept: tuple[Tensor, ...]  # `LogitGrads.by_cosine` of the first chunks, up to a factor, kept for backward

    @abstractmethod
    def combine(self, sample_stats: Tensor) -> CombinedNegatives:
        """Combine the shards, given the sum of their ``sample_stats`` over ranks."""

    def finish_embedding_grad(
        self, combined: CombinedNegatives, value_grad: Tensor, logit_sum_grad: Tensor | None
    ) -> Tensor:
        """Return Σ_j ∂loss/∂cos_j·w_j over this shard's negatives, [B, D] (∂(w·x) instead of ∂cos for raw logits).

        Args:
            combined: of all shards.
            value_grad: [B] float64 ∂loss/∂value.
            logit_sum_grad: [B] float64 ∂loss/∂logit_sum, or None.
        """
        grad = self._scale(self.embedding_grad, combined.ratio * value_grad)
        if self.mean_embedding_grad is not None and logit_sum_grad is not None:
            grad.add_(self._scale(self.mean_embedding_grad, logit_sum_grad))
        return grad

    def _scale(self, embedding_grad: Tensor, factors: Tensor) -> Tensor:
        """Multiply in float64, store in the compute dtype."""
        factors = factors * self.chunks.cosine_grad
        return torch.mul(embedding_grad, factors[:, None], out=torch.empty_like(embedding_grad))


@dataclass(frozen=True)
class CombinedNegatives(ABC):
    """The negatives of all shards. All but ``ratio`` are equal on all ranks."""

    chunks: ClassChunks
    value: Tensor  # [B] float64: log Σ exp(z_j), or Σ softplus(z_j)
    offset_grad: Tensor  # [B] float64: its derivative by a number added to all logits
    ratio: Tensor  # [B] float64: factor that turns the shard's sums into derivatives of the value
    logit_sum: Tensor | None = None  # [B] float64 Σ z_j, for a loss that needs the mean logit
    count: Tensor | None = None  # [B] float64, number of its terms

    @abstractmethod
    def backward(self, value_grad: Tensor, logit_sum_grad: Tensor | None) -> NegativesBackward:
        """Prepare the walk that computes the rows' gradient.

        Args:
            value_grad: [B] float64 ∂(loss to differentiate)/∂value.
            logit_sum_grad: [B] float64 ∂(loss to differentiate)/∂logit_sum, or None.
        """


@dataclass(frozen=True)
class NegativesBackward(ABC):
    """Derivatives of the loss by the logits of this shard's negatives, chunk by chunk."""

    chunks: ClassChunks
    sample_factors: Tensor  # [B] factors of each sample that `logit_grads` leave out

    @abstractmethod
    def logit_grads(self, chunk: Chunk, kept: tuple[Tensor, ...]) -> LogitGrads:
        """Return the derivatives by a chunk's logits, up to ``sample_factors``.

        Args:
            chunk: the classes j.
            kept: see :class:`NegativesForward`.
        """
