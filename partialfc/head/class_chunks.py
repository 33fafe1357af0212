"""One shard's active rows, a chunk at a time, and the logits of the batch against them.

The logits of a step would be [batch, active rows]; here at most a few chunks of them exist at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.losses import Loss, Samples

NORM_EPS = 1e-12  # as torch.nn.functional.normalize
_CPU_CHUNK_ELEMENTS = 1 << 18  # logits of a chunk on a CPU: 1 MiB in float32, what its second-level cache holds


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of the active rows."""

    index: int
    start: int
    stop: int
    directions: Tensor  # [n, D]: normalised weights; the weights themselves for raw logits
    inverse_norms: Tensor | None  # [n]: 1/‖w‖; None for raw logits


@dataclass(frozen=True)
class ActiveRows:
    """The classes of this shard that take part in a step."""

    rows: Tensor | None  # [A] int64 sorted, counted from the shard's first class; None: all of them
    count: int  # A
    log_weight: Tensor | None = None  # [A]: log of a class's weight in the denominator (corrected sampling)
    largest_log_weight: float = 0.0


class ClassChunks:
    """Walks the active rows of ``weight`` and forms logits against a batch.

    Args:
        embeddings: [B, D], normalised unless the loss takes raw logits.
        weight: [rows of the shard, D].
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
        self.raw = loss.raw_logits
        self.linear = loss.negatives_are_linear
        self.embeddings = embeddings
        self.scaled = embeddings if self.raw else embeddings * loss.scale  # saves a pass over the logits
        batch, dim = embeddings.shape
        bytes_per_row = embeddings.element_size() * (batch * (2 if self.linear else 6) + 2 * dim)
        affordable = memory_budget // bytes_per_row
        preferred = max(256, _CPU_CHUNK_ELEMENTS // max(batch, 1)) if weight.device.type == "cpu" else affordable // 2
        self.rows_per_chunk = max(1, min(affordable, preferred, active.count))
        spare = memory_budget - self.rows_per_chunk * bytes_per_row
        #: How many chunks' exponentials the rest of the budget holds, so that backward need not form them again.
        self.chunks_to_keep = max(0, spare // max(1, self.rows_per_chunk * batch * embeddings.element_size()))
        self._logits: Tensor | None = None

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks in order. A chunk's tensors are valid until the next one is taken."""
        dtype, count = self.embeddings.dtype, self.active.count
        self._logits = self.embeddings.new_empty(len(self.embeddings) * self.rows_per_chunk)
        buffer = self.embeddings.new_empty(self.rows_per_chunk, self.weight.shape[1])
        for index, start in enumerate(range(0, count, self.rows_per_chunk)):
            stop = min(start + self.rows_per_chunk, count)
            space = buffer[: stop - start]
            if self.active.rows is None:
                weight = self.weight[start:stop]
            else:
                rows = self.active.rows[start:stop]
                weight = torch.index_select(self.weight, 0, rows, out=space if self.weight.dtype is dtype else None)
            weight = weight.to(dtype)
            if self.raw:
                yield Chunk(index, start, stop, weight, None)
            else:
                inverse = torch.linalg.vector_norm(weight, dim=1).clamp_min_(NORM_EPS).reciprocal_()
                yield Chunk(index, start, stop, torch.mul(weight, inverse[:, None], out=space), inverse)
        self._logits = None  # nothing of this size stays alive between forward and backward

    def logit_bound(self) -> float:
        """The largest |z| that :meth:`logits` can give; ``math.inf`` if there is none."""
        return self.loss.logit_bound() + self.active.largest_log_weight

    def logits_buffer(self, chunk: Chunk) -> Tensor:
        """Space for the logits of ``chunk``, [B, n]; the same for every chunk."""
        assert self._logits is not None, "only while iterating over chunks"
        batch, classes = len(self.embeddings), chunk.stop - chunk.start
        return self._logits[: batch * classes].view(batch, classes)

    def logits(self, chunk: Chunk, keep: bool = False) -> tuple[Tensor, Tensor | None]:
        """Negative logits z, [B, n], and their slopes dz/dcos, [B, n]; None where dz/dcos is the loss's scale.

        Left out: −∞. The logits live in a buffer that the next call overwrites, unless the caller is to ``keep`` them.
        """
        batch, classes = len(self.embeddings), chunk.stop - chunk.start
        out = self.embeddings.new_empty(batch, classes) if keep else self.logits_buffer(chunk)
        slopes, threshold = None, self.filter_threshold
        if self.linear:
            logits = torch.mm(self.scaled, chunk.directions.t(), out=out)
            if threshold is not None:
                logits.masked_fill_(logits > threshold * self.loss.scale, -torch.inf)
        else:
            cosines = torch.mm(self.embeddings, chunk.directions.t(), out=out)
            with torch.enable_grad():
                variable = cosines.detach().requires_grad_()
                curved = self.loss.negative_logits(variable, self.samples)
                (slopes,) = torch.autograd.grad(curved.sum(), variable)
            logits = curved.detach()
            if threshold is not None:
                logits = logits.masked_fill(cosines > threshold, -torch.inf)
        if self.bias is not None:
            logits.add_(self._of_chunk(self.bias, chunk))
        if self.active.log_weight is not None:
            logits.add_(self.active.log_weight[chunk.start : chunk.stop])
        self._leave_out_targets(logits, chunk)
        return logits, slopes

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
