"""One shard's active rows, a chunk at a time, and the logits of the batch against them.

The logits of a step would be [batch, active rows]; only a few chunks of them exist at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.softmax.products import ALIGNMENT, Products, SplitMatrix, WeightedEmbeddings, padded
from partialfc.head.softmax.sampling import ActiveRows
from partialfc.losses import Loss, Samples

NORM_EPS = 1e-12  # as torch.nn.functional.normalize
# Logits of a chunk on a CPU: 1 MiB in float32, the size of a second-level cache. Elsewhere enough to keep the device
# busy for longer than the host takes to launch a chunk's kernels, a few hundred microseconds.
_CPU_CHUNK_ELEMENTS, _GPU_CHUNK_ELEMENTS = 1 << 18, 1 << 25


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of the active rows, each with K weights (1 without sub-centers)."""

    index: int
    start: int
    stop: int
    unit_weights: Tensor  # [K, n, D]: normalised weights; the weights themselves for raw logits
    inverse_norms: Tensor | None  # [K, n]: 1/‖w‖; None for raw logits


@dataclass(frozen=True)
class Logits:
    """Logits of the batch against a chunk. Negatives that are left out, and each sample's own class, are −∞."""

    values: Tensor  # [B, n]
    cosine_grads: Tensor | None = None  # [B, n] dz/dcos; None where it is `ClassChunks.cosine_grad` for all
    nearest: Tensor | None = None  # [B, n] uint8: the nearest sub-center of each class; None for K = 1


@dataclass(frozen=True)
class LogitGrads:
    """Derivatives of a loss by the logits of a chunk."""

    by_cosine: SplitMatrix  # [B, n] ∂loss/∂cos, up to `ClassChunks.cosine_grad` where all share it
    nearest: Tensor | None = None  # as in `Logits`
    by_logit: Tensor | None = None  # [B, n] ∂loss/∂z; None if only `by_cosine` is known


class ClassChunks:
    """Walks the active rows of ``weight`` and forms logits against a batch.

    Args:
        loss: turns cosines into logits.
        samples: of the batch.
        unit_embeddings: [B, D], normalised; raw ones for a loss on raw logits.
        weight: [rows of the shard, D], or [rows of the shard, K, D].
        bias: [rows of the shard] or None.
        active: the A rows to walk. Logits of places without a class of their own are left out (set to −∞).
        target_rows: [B] int64: position of each sample's class among the active rows; -1 if it is not in this shard.
            These logits are left out (set to −∞).
        products: forms the matrix products.
        filter_threshold: negatives with a cosine above it are left out.
        memory_budget: bytes for all buffers made here, kept logits included.
    """

    def __init__(
        self,
        loss: Loss,
        samples: Samples,
        unit_embeddings: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        active: ActiveRows,
        target_rows: Tensor,
        products: Products,
        filter_threshold: float | None,
        memory_budget: int,
    ) -> None:
        self.loss, self.samples, self.weight, self.bias = loss, samples, weight, bias
        self.active, self.products, self.filter_threshold = active, products, filter_threshold
        self.raw, self.linear = loss.raw_logits, loss.negatives_are_linear
        #: dz/dcos of linear negatives, applied once to the embeddings, which saves a pass over the logits.
        self.cosine_grad = loss.scale if self.linear else 1.0
        self.unit_embeddings = unit_embeddings
        #: Lengths of raw embeddings, [B, 1], where products take unit vectors only.
        self._lengths: Tensor | None = None
        directions = unit_embeddings
        if self.raw and products.half:
            self._lengths = samples.norms.to(unit_embeddings.dtype)[:, None]
            directions = unit_embeddings / self._lengths
        self._logit_embeddings = products.logit_embeddings(directions, self.cosine_grad)
        offset = loss.logit_offset()
        self.offset = None if offset is None else offset.detach().to(unit_embeddings.dtype)
        self.sub_centers = weight.shape[1] if weight.dim() == 3 else 1
        self._plan_chunks(memory_budget)
        self._logits: Tensor | None = None
        self._target_chunks = torch.div(target_rows, self.rows_per_chunk, rounding_mode="floor")  # −1: none
        self._target_columns = (target_rows % self.rows_per_chunk)[:, None]

    def _plan_chunks(self, memory_budget: int) -> None:
        """Choose the chunk size and the number of chunks to keep, so that all buffers fit the budget, in bytes."""
        batch, dim = self.unit_embeddings.shape
        element_size = self.unit_embeddings.element_size()
        on_cpu = self.weight.device.type == "cpu"
        buffers = 8 if not self.linear else 2 if on_cpu or self.filter_threshold is not None else 1
        buffers += 3 * (self.sub_centers > 1) + 6 * ("mean_logit" in self.loss.needs)
        copies = 2 + (self.weight.dim() == 3) + (self.weight.dtype is not self.unit_embeddings.dtype)
        bytes_per_row = element_size * (batch * buffers + dim * self.sub_centers * copies)
        bytes_per_row += self.products.bytes_per_logit * batch + self.products.bytes_per_weight * dim
        affordable = memory_budget // bytes_per_row
        preferred = max(256, (_CPU_CHUNK_ELEMENTS if on_cpu else _GPU_CHUNK_ELEMENTS) // max(batch, 1))
        rows = min(affordable, preferred)
        if self.products.half and rows > ALIGNMENT:
            rows -= rows % ALIGNMENT
        self.rows_per_chunk = max(1, min(rows, self.active.count))
        spare = memory_budget - self.rows_per_chunk * bytes_per_row
        kept_size = self.rows_per_chunk * batch * (self.products.bytes_per_logit or element_size)
        #: Number of chunks whose derivatives fit the rest of the budget; backward need not form these again.
        self.chunks_to_keep = max(0, spare // max(1, kept_size))
        if self.products.half and self.active.count <= self.rows_per_chunk * (self.chunks_to_keep + 1):
            self.chunks_to_keep += 1  # in the last one's working memory
        if not self.linear or self.sub_centers > 1 or (self.bias is not None and self.products.half):
            self.chunks_to_keep = 0  # more would have to be kept than the operand of the product

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks in order. A chunk's tensors are valid until the next one is taken."""
        embeddings, shape = self.unit_embeddings, self.weight.shape[1:]
        self._logits = embeddings.new_empty(len(embeddings) * self._row_length(self.rows_per_chunk))
        gathered = embeddings.new_empty(self.rows_per_chunk, *shape)
        # One weight per class is normalised in place. Sub-centers are laid out by k.
        normalised = gathered if self.weight.dim() == 2 else torch.empty_like(gathered)
        for index, start in enumerate(range(0, self.active.count, self.rows_per_chunk)):
            stop = min(start + self.rows_per_chunk, self.active.count)
            weight = self._gather_weight(start, stop, gathered[: stop - start])
            if self.raw:
                yield Chunk(index, start, stop, weight, None)
            else:
                inverse = torch.linalg.vector_norm(weight, dim=2).clamp_min_(NORM_EPS).reciprocal_()
                space = normalised.flatten()[: weight.numel()].view(weight.shape)
                yield Chunk(index, start, stop, torch.mul(weight, inverse[:, :, None], out=space), inverse)
        self._logits = None  # nothing of this size stays alive between forward and backward

    def _gather_weight(self, start: int, stop: int, space: Tensor) -> Tensor:
        """Return the weights of active rows [start, stop), [K, n, D] in the compute dtype; may use ``space [n, …]``."""
        if self.active.rows is None:
            weight = self.weight[start:stop]
        else:
            out = space if self.weight.dtype is space.dtype else None
            weight = torch.index_select(self.weight, 0, self.active.rows[start:stop], out=out)
        weight = weight.to(space.dtype)
        return weight[None] if weight.dim() == 2 else weight.transpose(0, 1)

    def logit_bound(self) -> float:
        """Return the largest |z + log weight| that a negative can have; ``math.inf`` if there is no bound."""
        return self.loss.logit_bound() + self.active.largest_log_weight

    def log_weight(self, chunk: Chunk) -> Tensor | None:
        """Return the log of the weights of the chunk's classes as negatives, [n]; None: all weigh 1."""
        return None if self.active.log_weight is None else self.active.log_weight[chunk.start : chunk.stop]

    def logits_buffer(self, chunk: Chunk) -> Tensor:
        """Return space for the logits of ``chunk``, [B, n]; the same for every chunk."""
        assert self._logits is not None, "only while iterating over chunks"
        batch, classes = len(self.unit_embeddings), chunk.stop - chunk.start
        length = self._row_length(classes)
        return self._logits[: batch * length].view(batch, length)[:, :classes]

    def _row_length(self, classes: int) -> int:
        """Return the distance between rows in a buffer of logits."""
        return padded(classes) if self.products.half else classes

    def logits(self, chunk: Chunk, keep: bool = False) -> Logits:
        """Return the logits against ``chunk``, in a buffer that the next call overwrites unless ``keep`` is set.

        Set ``keep`` to keep the derivatives that :meth:`logit_grads` forms in the same place.
        """
        out = self.logits_buffer(chunk)
        if keep and not self.products.half:
            out = torch.empty_like(out)
        cosine_grads = None
        logits, nearest = self._similarity(chunk, out)
        if self.linear:
            if self.filter_threshold is not None:
                threshold = self.filter_threshold * self.cosine_grad * self._raw_lengths(chunk)
                logits.masked_fill_(logits > threshold, -torch.inf)
        else:
            cosines = logits
            with torch.enable_grad():
                variable = cosines.detach().requires_grad_()
                curved = self.loss.negative_logits(variable, self.samples)
                (cosine_grads,) = torch.autograd.grad(curved.sum(), variable)
            logits = curved.detach()
            if self.filter_threshold is not None:
                logits = logits.masked_fill(cosines > self.filter_threshold, -torch.inf)
        if self.bias is not None:
            logits.add_(self._of_chunk(self.bias, chunk))
        if self.offset is not None:
            logits.add_(self.offset)
        self._leave_out_targets(logits, chunk)
        self._leave_out_padding(logits, chunk)
        return Logits(logits, cosine_grads, nearest)

    def _raw_lengths(self, chunk: Chunk) -> Tensor | float:
        """Return the factor ‖x‖·‖w‖ between cosines and raw logits, [B, n]; 1 for logits of cosines."""
        if not self.raw:
            return 1.0
        weight_norms = torch.linalg.vector_norm(chunk.unit_weights[0], dim=1)
        return self.samples.norms.to(weight_norms.dtype)[:, None] * weight_norms

    def _similarity(self, chunk: Chunk, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return cosines (inner products for raw logits) of the batch with a chunk's classes, and nearest sub-centers.

        Cosines of linear negatives are multiplied by their derivative: they are logits already.
        """
        if self._lengths is not None:  # of raw embeddings: what the product leaves out
            weights = chunk.unit_weights[0]
            lengths = torch.linalg.vector_norm(weights, dim=1).clamp_min_(NORM_EPS)
            cosines = self._scaled_cosines(weights / lengths[:, None], out)
            return cosines.mul_(self._lengths).mul_(lengths), None
        best = self._scaled_cosines(chunk.unit_weights[0], out)
        if self.sub_centers == 1:
            return best, None
        nearest = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
        for k in range(1, self.sub_centers):
            other = self._scaled_cosines(chunk.unit_weights[k], torch.empty_like(best))
            nearest.masked_fill_(other > best, k)
            torch.maximum(best, other, out=best)
        return best, nearest

    def _scaled_cosines(self, weights: Tensor, out: Tensor) -> Tensor:
        return self.products.logits(self._logit_embeddings, self.products.logit_weights(weights), out)

    @property
    def scaled_embeddings(self) -> Tensor:
        """Return the unit embeddings times `cosine_grad`, [B, D]."""
        return self.unit_embeddings if self.cosine_grad == 1.0 else self.unit_embeddings * self.cosine_grad

    def logit_grads(self, logits: Logits, by_logit: Tensor) -> LogitGrads:
        """Turn ∂loss/∂z of a chunk, [B, n], into the operands of the gradients."""
        by_cosine = by_logit if logits.cosine_grads is None else by_logit * logits.cosine_grads
        return LogitGrads(self.products.split(by_cosine), logits.nearest, by_logit)

    def exp_grads(self, logits: Logits) -> LogitGrads:
        """Return :meth:`logit_grads` where ∂loss/∂z is exp(z), which may be overwritten."""
        if logits.cosine_grads is not None or self.bias is not None:
            return self.logit_grads(logits, logits.values.exp_())
        return LogitGrads(self.products.split_exp(logits.values), logits.nearest)

    def kept_grads(self, by_cosine: Tensor) -> LogitGrads:
        """Return the derivatives of a chunk whose ``LogitGrads.by_cosine.values`` were kept."""
        split = SplitMatrix(by_cosine, self.products.parts)
        return LogitGrads(split, by_logit=None if self.products.half else by_cosine)

    def add_embedding_grad(self, chunk: Chunk, grads: LogitGrads, out: Tensor) -> None:
        """Add Σ_j ∂loss/∂cos_j·(unit weight of class j, of its nearest sub-center) to ``out [B, D]``.

        Args:
            chunk: the classes j.
            grads: up to factors still to be applied to ``out``.
            out: [B, D].
        """
        for k in range(self.sub_centers):
            weights = self.products.split(chunk.unit_weights[k])
            self.products.add_embedding_grad(_of_sub_center(grads, k), weights, out)

    def write_weight_grad(self, chunk: Chunk, grads: LogitGrads, embeddings: WeightedEmbeddings, out: Tensor) -> None:
        """Write Σ_i ∂loss/∂cos_i·``embeddings[i]`` to ``out [n, D]`` or ``[n, K, D]``, through the rows' normalisation.

        Args:
            chunk: the n classes.
            grads: up to the factors in ``embeddings``.
            embeddings: [B, D] unit embeddings times these factors.
            out: the rows' gradient.
        """
        for k in range(self.sub_centers):
            of_k = _of_sub_center(grads, k)
            row_grad = self.products.weight_grad(of_k, embeddings, out if out.dim() == 2 else None)
            if chunk.inverse_norms is not None:
                unit_weights = chunk.unit_weights[k]
                along = torch.linalg.vecdot(unit_weights, row_grad)
                row_grad.addcmul_(unit_weights, along[:, None], value=-1).mul_(chunk.inverse_norms[k][:, None])
            if out.dim() == 3:
                out[:, k] = row_grad

    def _of_chunk(self, per_row: Tensor, chunk: Chunk) -> Tensor:
        if self.active.rows is None:
            return per_row[chunk.start : chunk.stop]
        return per_row[self.active.rows[chunk.start : chunk.stop]]

    def _leave_out_targets(self, logits: Tensor, chunk: Chunk) -> None:
        """Set each sample's own class to −∞: a fixed number of operations, no wait for the device."""
        columns = self._target_columns
        if logits.shape[1] < self.rows_per_chunk:  # the last chunk
            columns = columns.clamp_max(logits.shape[1] - 1)
        inside = (self._target_chunks == chunk.index)[:, None]
        logits.scatter_(1, columns, logits.gather(1, columns).masked_fill_(inside, -torch.inf))

    def _leave_out_padding(self, logits: Tensor, chunk: Chunk) -> None:
        """Set the columns of places without a class of their own to −∞."""
        padding = self.active.padding
        if padding is not None and chunk.stop > padding.start:
            first = max(chunk.start, padding.start)
            unused = padding.unused[first - padding.start : chunk.stop - padding.start]
            logits[:, first - chunk.start :].masked_fill_(unused, -torch.inf)


def _of_sub_center(grads: LogitGrads, k: int) -> SplitMatrix:
    """Return the derivatives by the cosines of sub-center k: 0 where it is not the nearest."""
    return grads.by_cosine if grads.nearest is None else grads.by_cosine.masked(grads.nearest == k)
