"""Center loss on the classifier's own shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from partialfc.errors import ConfigError
from partialfc.head.ownership import OwnedSamples


class CenterLoss(nn.Module):
    """``½·weight·mean‖x_i − k_{y_i}‖²`` added to the head's loss (Wen et al., ECCV 2016, eq. 2–5).

    x are the raw embeddings, k one center per class. The centers lie on the rank that owns the class and start at 0.
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
        self._pending: list[tuple[OwnedSamples, Tensor]] = []  # with x − k [B, D], of each micro-batch

    def allocate(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Create the centers of a shard; called by the head that owns it."""
        if hasattr(self, "centers"):
            raise ConfigError("this CenterLoss already belongs to a head; give each head its own")
        self.register_buffer("centers", torch.zeros(rows, dim, dtype=dtype, device=device))

    def accumulate(self, owned: OwnedSamples, offsets: Tensor) -> None:
        """Add ``offsets [B, D]``, x − k of the ``owned`` samples and 0 of all others, to the current step."""
        self._pending.append((owned, offsets))

    @torch.no_grad()
    def apply_pending(self) -> None:
        """Move the centers of the classes seen since the last step (eq. 4)."""
        if self._pending and len(self.centers):
            rows = torch.cat([owned.rows for owned, _ in self._pending])  # [n]
            counted = torch.cat([owned.mask for owned, _ in self._pending])
            offsets = torch.cat([offsets for _, offsets in self._pending])
            # At most n classes, numbered in the order of their rows: no size here is known to the device alone.
            ordered, order = rows.sort()
            number = torch.zeros_like(rows)
            number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
            sample_class = torch.empty_like(rows).scatter_(0, order, number)
            class_rows = torch.zeros_like(rows).scatter_(0, sample_class, rows)
            sums = torch.zeros_like(offsets).index_add_(0, sample_class, offsets)
            counts = torch.zeros_like(sums[:, 0]).index_add_(0, sample_class, counted.to(sums.dtype))
            moves = (sums / (1 + counts)[:, None]).to(self.centers.dtype)
            self.centers.index_add_(0, class_rows, moves, alpha=self.alpha)
        self.discard_pending()

    @property
    def pending_offsets(self) -> list[Tensor]:
        """Offsets by which the next applied step will move the centers, [B, D] for each micro-batch."""
        return [offsets for _, offsets in self._pending]

    def discard_pending(self) -> None:
        """Discard the offsets of a skipped step."""
        self._pending.clear()

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, alpha={self.alpha:g}"
