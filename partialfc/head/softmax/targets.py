"""The targets of the samples whose class this shard owns, in float64: one D-vector a sample buys exact margins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.softmax.class_chunks import NORM_EPS
from partialfc.head.softmax.sampling import OwnedSamples


@dataclass(frozen=True)
class Targets:
    """The n owned samples and the weights of their own classes; of K sub-centers the nearest. All in float64."""

    owned: OwnedSamples
    nearest: Tensor | None  # [n] int64, the nearest sub-center; None without sub-centers
    unit_embeddings: Tensor  # [n, D]
    unit_weights: Tensor  # [n, D]
    embedding_norms: Tensor  # [n]
    weight_norms: Tensor  # [n]
    cosines: Tensor  # [n]
    similarity: Tensor  # [n] input of the loss: the cosine, or w·x + b for raw logits
    raw: bool  # w·x + b

    def embedding_grad(self, similarity_grad: Tensor, norm_grad: Tensor | None) -> Tensor:
        """Return ∂loss/∂(raw embeddings) through the targets, [n, D] float64.

        Args:
            similarity_grad: [n] ∂loss/∂similarity.
            norm_grad: [n] ∂loss/∂(length of the embedding), if the loss depends on it.
        """
        if self.raw:
            grad = self.unit_weights * (similarity_grad * self.weight_norms)[:, None]
        else:
            # In float64, since w − cos·x cancels in a trained state.
            tangent = self.unit_weights - self.cosines[:, None] * self.unit_embeddings
            grad = tangent * (similarity_grad / self.embedding_norms)[:, None]
        return grad if norm_grad is None else grad + self.unit_embeddings * norm_grad[:, None]

    def weight_grad(self, similarity_grad: Tensor) -> Tensor:
        """Return ∂loss/∂(weight of each sample's class) through the targets, [n, D] float64, from [n] as above."""
        if self.raw:
            return self.unit_embeddings * (similarity_grad * self.embedding_norms)[:, None]
        tangent = self.unit_embeddings - self.cosines[:, None] * self.unit_weights
        return tangent * (similarity_grad / self.weight_norms)[:, None]


def find_targets(
    owned: OwnedSamples, embeddings: Tensor, norms: Tensor, weight: Tensor, bias: Tensor | None, raw: bool
) -> Targets:
    """Compare each owned sample with its own class.

    Args:
        owned: n samples of the batch.
        embeddings: [B, D] raw.
        norms: [B] float64, their lengths.
        weight: [rows of the shard, D] or [rows, K, D].
        bias: [rows] or None.
        raw: the loss takes w·x + b, not cosines.
    """
    x, w = embeddings[owned.samples].double(), weight[owned.rows].double()
    x_norms, w_norms = norms[owned.samples], torch.linalg.vector_norm(w, dim=-1).clamp_min(NORM_EPS)
    x, w = x / x_norms[:, None], w / w_norms[..., None]
    nearest = None
    if w.dim() == 3:  # [n, K, D]
        nearest = torch.linalg.vecdot(w, x[:, None]).argmax(dim=1)
        each = torch.arange(len(w), device=w.device)
        w, w_norms = w[each, nearest], w_norms[each, nearest]
    cosines = torch.linalg.vecdot(x, w)
    similarity = cosines
    if raw:
        similarity = cosines * x_norms * w_norms
        if bias is not None:
            similarity = similarity + bias[owned.rows].double()
    return Targets(owned, nearest, x, w, x_norms, w_norms, cosines, similarity, raw)
