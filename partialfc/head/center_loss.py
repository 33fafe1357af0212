"""Center loss on the classifier's own shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from partialfc.errors import ConfigError


class CenterLoss(nn.Module):
    """``½·weight·mean‖x_i − k_{y_i}‖²`` added to the head's loss (Wen et al., ECCV 2016, eq. 2–5).

    x are the raw embeddings, k one center a class. The centers lie on the rank that owns the class and start at 0.
    They have no gradient: with each applied optimizer step ``k_j ← k_j − alpha·Σ(k_j − x_i)/(1 + n_j)`` over the n_j
    samples of class j in that step's batch (all micro-batches together). A skipped step drops its sums.

    Args:
        weight: λ of ``L = L_s + λ·L_c``; ≥ 0.
        alpha: the centers' own learning rate, in [0, 1].
    """

    centers: Tensor  # [num_classes of this shard, embedding_dim]

    def __init__(self, weight: float = 0.003, alpha: float = 0.5) -> None:
        super().__init__()
        if not weight >= 0:
            raise ConfigError(f"center loss: weight must be at least 0, got {weight}")
        if not 0 <= alpha <= 1:
            raise ConfigError(f"center loss: alpha must lie in [0, 1], got {alpha}")
        self.weight = float(weight)
        self.alpha = float(alpha)
        self._pending: list[tuple[Tensor, Tensor]] = []  # (rows [n], x − k [n, D]) of each micro-batch

    def allocate(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Create the centers of a shard; called by the head that owns it."""
        if hasattr(self, "centers"):
            raise ConfigError("this CenterLoss already belongs to a head; give each head its own")
        self.register_buffer("centers", torch.zeros(rows, dim, dtype=dtype, device=device))

    def accumulate(self, rows: Tensor, offsets: Tensor) -> None:
        """Add ``offsets [n, D]`` = x − k of samples whose classes are ``rows [n]`` int64 to the step under way."""
        self._pending.append((rows, offsets))

    @torch.no_grad()
    def apply_pending(self) -> None:
        """Move the centers of the classes seen since the last step (eq. 4)."""
        if self._pending:
            rows, sample_class = torch.cat([rows for rows, _ in self._pending]).unique(return_inverse=True)
            offsets = torch.cat([offsets for _, offsets in self._pending])
            sums = torch.zeros(len(rows), offsets.shape[1], dtype=offsets.dtype, device=offsets.device)
            sums.index_add_(0, sample_class, offsets)
            counts = torch.bincount(sample_class, minlength=len(rows)).to(sums.dtype)
            self.centers.index_add_(0, rows, (sums / (1 + counts)[:, None]).to(self.centers.dtype), alpha=self.alpha)
        self.discard_pending()

    @property
    def pending_offsets(self) -> list[Tensor]:
        """Offsets that the next applied step would move the centers by, [n, D] for each micro-batch."""
        return [offsets for _, offsets in self._pending]

    def discard_pending(self) -> None:
        """Discard the offsets of a skipped step."""
        self._pending.clear()

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, alpha={self.alpha:g}"
