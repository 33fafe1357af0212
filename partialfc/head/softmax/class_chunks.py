"""One shard's active rows, a chunk at a time, and the logits of the batch against them.

The logits of a step would be [batch, active rows]; here at most a few chunks of them exist at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.softmax.sampling import ActiveRows
from partialfc.losses import Loss, Samples

NORM_EPS = 1e-12  # as torch.nn.functional.normalize
_CPU_CHUNK_ELEMENTS = 1 << 18  # logits of a chunk on a CPU: 1 MiB in float32, what its second-level cache holds


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of the active rows, each with K weights (1 without sub-centers)."""

    index: int
    start: int
    stop: int
    directions: Tensor  # [K, n, D]: normalised weights; the weights themselves for raw logits
    inverse_norms: Tensor | None  # [K, n]: 1/‖w‖; None for raw logits


@dataclass(frozen=True)
class Logits:
    """Logits of the batch against a chunk. Negatives that are left out, and each sample's own class, have −∞."""

    values: Tensor  # [B, n]
    slopes: Tensor | None  # [B, n] dz/dcos; None where it is `ClassChunks.slope` for all
    nearest: Tensor | None  # [B, n] uint8: the sub-center that the class's cosine comes from; None for K = 1


class ClassChunks:
    """Walks the active rows of ``weight`` and forms logits against a batch.

    Args:
        embeddings: [B, D], normalised unless the loss takes raw logits.
        weight: [rows of the shard, D], or [rows of the shard, K, D].
        bias: [rows of the shard] or None.
        target_rows: [B] int64: position of each sample's class among the active rows; -1 if it is not in this shard.
            These logits are left out (set to −∞).
        filter_threshold: negatives with a cosine above it are left out.
        memory_budget: bytes for all buffers made here, kept logits included.
    """

    def __init__(
        self,
        loss: Loss,
        samples: Samples,
        embeddings: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        active: ActiveRows,
        target_rows: Tensor,
        filter_threshold: float | None,
        memory_budget: int,
    ) -> None:
        self.loss, self.samples, self.weight, self.bias = loss, samples, weight, bias
        self.active, self.target_rows, self.filter_threshold = active, target_rows, filter_threshold
        self.raw, self.linear = loss.raw_logits, loss.negatives_are_linear
        #: dz/dcos of linear negatives. It is applied to the embeddings once: that saves a pass over the logits.
        self.slope = loss.scale if self.linear else 1.0
        self.embeddings = embeddings
        self.scaled = embeddings if self.slope == 1.0 else embeddings * self.slope
        offset = loss.logit_offset()
        self.offset = None if offset is None else offset.detach().to(embeddings.dtype)
        self.sub_centers = weight.shape[1] if weight.dim() == 3 else 1
        batch, dim = embeddings.shape
        buffers = (2 if self.linear else 8) + 3 * (self.sub_centers > 1) + 6 * ("mean_logit" in loss.needs)
        copies = 2 + (weight.dim() == 3) + (weight.dtype is not embeddings.dtype)
        rows = dim * self.sub_centers * copies
        bytes_per_row = embeddings.element_size() * (batch * buffers + rows)
        affordable = memory_budget // bytes_per_row
        preferred = max(256, _CPU_CHUNK_ELEMENTS // max(batch, 1)) if weight.device.type == "cpu" else affordable // 2
        self.rows_per_chunk = max(1, min(affordable, preferred, active.count))
        spare = memory_budget - self.rows_per_chunk * bytes_per_row
        #: How many chunks' exponentials the rest of the budget holds, so that backward need not form them again.
        self.chunks_to_keep = max(0, spare // max(1, self.rows_per_chunk * batch * embeddings.element_size()))
        if not self.linear or self.sub_centers > 1:
            self.chunks_to_keep = 0  # slopes and nearest sub-centers would have to be kept too
        self._logits: Tensor | None = None

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks in order. A chunk's tensors are valid until the next one is taken."""
        dtype, count = self.embeddings.dtype, self.active.count
        self._logits = self.embeddings.new_empty(len(self.embeddings) * self.rows_per_chunk)
        shape = self.weight.shape[1:]
        gathered = self.embeddings.new_empty(self.rows_per_chunk, *shape)
        # One center a class: normalised where it was gathered. Sub-centers are laid out by k.
        normalised = gathered if self.weight.dim() == 2 else torch.empty_like(gathered)
        for index, start in enumerate(range(0, count, self.rows_per_chunk)):
            stop = min(start + self.rows_per_chunk, count)
            if self.active.rows is None:
                weight = self.weight[start:stop]
            else:
                rows, out = self.active.rows[start:stop], gathered[: stop - start]
                weight = torch.index_select(self.weight, 0, rows, out=out if self.weight.dtype is dtype else None)
            weight = weight.to(dtype)
            weight = weight[None] if weight.dim() == 2 else weight.transpose(0, 1)  # [K, n, D]
            if self.raw:
                yield Chunk(index, start, stop, weight, None)
            else:
                inverse = torch.linalg.vector_norm(weight, dim=2).clamp_min_(NORM_EPS).reciprocal_()
                space = normalised.flatten()[: weight.numel()].view(weight.shape)
                yield Chunk(index, start, stop, torch.mul(weight, inverse[:, :, None], out=space), inverse)
        self._logits = None  # nothing of this size stays alive between forward and backward

    def logit_bound(self) -> float:
        """The largest |z + log weight| of a negative; ``math.inf`` if there is none."""
        return self.loss.logit_bound() + self.active.largest_log_weight

    def log_weight(self, chunk: Chunk) -> Tensor | None:
        """[n]: the log of the weights that the chunk's classes have as negatives; None: all weigh 1."""
        return None if self.active.log_weight is None else self.active.log_weight[chunk.start : chunk.stop]

    def logits_buffer(self, chunk: Chunk) -> Tensor:
        """Space for the logits of ``chunk``, [B, n]; the same for every chunk."""
        assert self._logits is not None, "only while iterating over chunks"
        batch, classes = len(self.embeddings), chunk.stop - chunk.start
        return self._logits[: batch * classes].view(batch, classes)

    def logits(self, chunk: Chunk, keep: bool = False) -> Logits:
        """The logits against ``chunk``. They live in a buffer that the next call overwrites, unless the caller is to
        ``keep`` them.
        """
        batch, classes = len(self.embeddings), chunk.stop - chunk.start
        out = self.embeddings.new_empty(batch, classes) if keep else self.logits_buffer(chunk)
        slopes, threshold = None, self.filter_threshold
        logits, nearest = self._similarity(chunk, out)
        if self.linear:
            if threshold is not None:
                logits.masked_fill_(logits > threshold * self.slope * self._lengths(chunk), -torch.inf)
        else:
            cosines = logits
            with torch.enable_grad():
                variable = cosines.detach().requires_grad_()
                curved = self.loss.negative_logits(variable, self.samples)
                (slopes,) = torch.autograd.grad(curved.sum(), variable)
            logits = curved.detach()
            if threshold is not None:
                logits = logits.masked_fill(cosines > threshold, -torch.inf)
        if self.bias is not None:
            logits.add_(self._of_chunk(self.bias, chunk))
        if self.offset is not None:
            logits.add_(self.offset)
        self._leave_out_targets(logits, chunk)
        return Logits(logits, slopes, nearest)

    def _lengths(self, chunk: Chunk) -> Tensor | float:
        """What the inner products of raw logits are cosines times, [B, n]; 1 for cosines."""
        if not self.raw:
            return 1.0
        weights = torch.linalg.vector_norm(chunk.directions[0], dim=1)
        return self.samples.norms.to(weights.dtype)[:, None] * weights

    def _similarity(self, chunk: Chunk, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scaled cosines (inner products for raw logits) of the batch with a chunk's classes, and nearest sub-centers.

        ``scaled`` holds the slope of linear negatives, so these are logits already; it is 1 for others.
        """
        best = torch.mm(self.scaled, chunk.directions[0].t(), out=out)
        if self.sub_centers == 1:
            return best, None
        nearest = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
        for k in range(1, self.sub_centers):
            other = torch.mm(self.scaled, chunk.directions[k].t())
            nearest.masked_fill_(other > best, k)
            torch.maximum(best, other, out=best)
        return best, nearest

    def pull(self, chunk: Chunk, coefficients: Tensor, nearest: Tensor | None, out: Tensor) -> None:
        """``out [B, D] += Σ_j coefficients[:, j]·(direction of class j)``, of its nearest sub-center."""
        for k in range(self.sub_centers):
            of_k = coefficients if nearest is None else coefficients * (nearest == k)
            out.addmm_(of_k, chunk.directions[k])

    def push(self, chunk: Chunk, coefficients: Tensor, nearest: Tensor | None, vectors: Tensor, out: Tensor) -> None:
        """``out [n, D] or [n, K, D] = Σ_i coefficients[i]·vectors[i]``, through the normalisation of the rows.

        The coefficients are derivatives with respect to cosines, up to factors that ``vectors [B, D]`` hold.
        """
        for k in range(self.sub_centers):
            of_k = coefficients if nearest is None else coefficients * (nearest == k)
            gradient = torch.mm(of_k.t(), vectors, out=out if out.dim() == 2 else None)
            if chunk.inverse_norms is not None:
                directions = chunk.directions[k]
                along = torch.linalg.vecdot(directions, gradient)
                gradient.addcmul_(directions, along[:, None], value=-1).mul_(chunk.inverse_norms[k][:, None])
            if out.dim() == 3:
                out[:, k] = gradient

    def _of_chunk(self, per_row: Tensor, chunk: Chunk) -> Tensor:
        if self.active.rows is None:
            return per_row[chunk.start : chunk.stop]
        return per_row[self.active.rows[chunk.start : chunk.stop]]

    def _leave_out_targets(self, logits: Tensor, chunk: Chunk) -> None:
        """Set each sample's own class to −∞: a fixed number of operations, no wait for the device."""
        inside = (self.target_rows >= chunk.start) & (self.target_rows < chunk.stop)
        columns = (self.target_rows - chunk.start).clamp_(0, chunk.stop - chunk.start - 1)[:, None]
        kept = logits.gather(1, columns)
        logits.scatter_(1, columns, kept.masked_fill_(inside[:, None], -torch.inf))
