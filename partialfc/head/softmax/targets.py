"""The samples whose class this shard owns, in float64: one D-vector a sample buys exact margins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.softmax.class_chunks import NORM_EPS


@dataclass(frozen=True)
class Targets:
    """n samples of the global batch and their own classes' weights; of K sub-centers the nearest."""

    samples: Tensor  # [n] positions in the gathered batch
    rows: Tensor  # [n] rows of the shard
    nearest: Tensor | None  # [n] sub-center
    embeddings: Tensor  # [n, D] unit length
    directions: Tensor  # [n, D] unit length
    embedding_norms: Tensor  # [n]
    weight_norms: Tensor  # [n]
    cosines: Tensor  # [n]
    similarity: Tensor  # [n] what the loss sees: the cosines, or w·x + b
    raw: bool  # whether it is w·x + b

    def embedding_gradient(self, slope: Tensor, norm_slope: Tensor | None) -> Tensor:
        """∂loss/∂(raw embeddings) through the targets, [n, D] float64.

        Args:
            slope: [n] ∂loss/∂similarity.
            norm_slope: [n] ∂loss/∂(length of the embedding), where the loss depends on it.
        """
        if self.raw:
            gradient = self.directions * (slope * self.weight_norms)[:, None]
        else:
            # In float64, since w − cos·x cancels in a trained state.
            tangent = self.directions - self.cosines[:, None] * self.embeddings
            gradient = tangent * (slope / self.embedding_norms)[:, None]
        return gradient if norm_slope is None else gradient + self.embeddings * norm_slope[:, None]

    def row_gradient(self, slope: Tensor) -> Tensor:
        """∂loss/∂(weight of each sample's class) through the targets, [n, D] float64; ``slope`` as above."""
        if self.raw:
            return self.embeddings * (slope * self.embedding_norms)[:, None]
        tangent = self.embeddings - self.cosines[:, None] * self.directions
        return tangent * (slope / self.weight_norms)[:, None]


def find_targets(
    embeddings: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, first_class: int, raw: bool
) -> Targets:
    """The targets of the gathered batch, raw ``embeddings [B, D]`` and ``labels [B]``, that this shard owns."""
    rows = labels - first_class
    owned = ((rows >= 0) & (rows < len(weight)) & (labels >= 0)).nonzero().flatten()
    rows = rows[owned]
    x, w = embeddings[owned].double(), weight[rows].double()
    x_norms, w_norms = _norms(x), _norms(w)
    x, w = x / x_norms[..., None], w / w_norms[..., None]
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
            similarity = similarity + bias[rows].double()
    return Targets(owned, rows, nearest, x, w, x_norms, w_norms, cosines, similarity, raw)


def _norms(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1).clamp_min(NORM_EPS)
