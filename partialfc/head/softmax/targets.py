"""The targets of the samples whose class this shard owns, in float64: one D-vector per sample buys exact margins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.ownership import OwnedSamples
from partialfc.head.softmax.class_chunks import NORM_EPS


@dataclass(frozen=True)
class Targets:
    """The samples and the weights of their own classes; of K sub-centers the nearest. All in float64.

    Only owned samples have a class here. The others are computed with some row of the shard and end as −0: the host
    knows the size of the batch, but not the number of owned samples.
    """

    owned: OwnedSamples
    nearest: Tensor | None  # [B] int64, the nearest sub-center; None without sub-centers
    unit_embeddings: Tensor  # [B, D]
    unit_weights: Tensor  # [B, D]
    embedding_norms: Tensor  # [B]
    weight_norms: Tensor  # [B]
    cosines: Tensor  # [B]; 0 for a sample that is not owned
    similarity: Tensor  # [B] input of the loss: the cosine, or w·x + b for raw logits; 0 for a sample that is not owned
    raw: bool  # w·x + b

    def embedding_grad(self, similarity_grad: Tensor, norm_grad: Tensor | None) -> Tensor:
        """Return ∂loss/∂(raw embeddings) through the targets, [B, D] float64; −0 for a sample that is not owned.

        Args:
            similarity_grad: [B] ∂loss/∂similarity.
            norm_grad: [B] ∂loss/∂(length of the embedding), if the loss depends on it.
        """
        if self.raw:
            grad = self.unit_weights * (similarity_grad * self.weight_norms)[:, None]
        else:
            # In float64, since w − cos·x cancels in a trained state.
            tangent = self.unit_weights - self.cosines[:, None] * self.unit_embeddings
            grad = tangent * (similarity_grad / self.embedding_norms)[:, None]
        return self.owned.only(grad if norm_grad is None else grad + self.unit_embeddings * norm_grad[:, None])

    def weight_grad(self, similarity_grad: Tensor) -> Tensor:
        """Return ∂loss/∂(weight of each sample's class) through the targets, [B, D] float64, from [B] as above."""
        if self.raw:
            return self.owned.only(self.unit_embeddings * (similarity_grad * self.embedding_norms)[:, None])
        tangent = self.unit_embeddings - self.cosines[:, None] * self.unit_weights
        return self.owned.only(tangent * (similarity_grad / self.weight_norms)[:, None])


def find_targets(
    owned: OwnedSamples, embeddings: Tensor, norms: Tensor, weight: Tensor, bias: Tensor | None, raw: bool
) -> Targets:
    """Compare each owned sample with its own class.

    Args:
        owned: the samples that have their class here.
        embeddings: [B, D] raw.
        norms: [B] float64, their lengths.
        weight: [rows of the shard, D] or [rows, K, D].
        bias: [rows] or None.
        raw: the loss takes w·x + b, not cosines.
    """
    w = owned.of_class(weight).double()
    w_norms = torch.linalg.vector_norm(w, dim=-1).clamp_min(NORM_EPS)
    x, w = embeddings.double() / norms[:, None], w / w_norms[..., None]
    nearest = None
    if w.dim() == 3:  # [B, K, D]
        nearest = torch.linalg.vecdot(w, x[:, None]).argmax(dim=1)
        each = torch.arange(len(w), device=w.device)
        w, w_norms = w[each, nearest], w_norms[each, nearest]
    cosines = torch.linalg.vecdot(x, w).masked_fill(~owned.mask, 0.0)
    similarity = cosines
    if raw:
        similarity = cosines * norms * w_norms
        if bias is not None:
            similarity = torch.where(owned.mask, similarity + owned.of_class(bias).double(), 0.0)
    return Targets(owned, nearest, x, w, norms, w_norms, cosines, similarity, raw)
