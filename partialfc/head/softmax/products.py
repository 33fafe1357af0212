"""The matrix products of a step, in float32 or on the 16-bit units of a GPU.

There are three: logits ``x·wᵀ``, the embeddings' gradient ``p·w`` and the rows' gradient ``pᵀ·x``, where p holds
derivatives by the logits. 16-bit operands are summed, and their products stored, in float32. Logits take float16: it
has the finer grid, and unit vectors never leave its range. Gradients take bfloat16, which has the range of exp(z).

On a CPU the operands are rounded alike and multiplied in float32: to inspect a GPU's results, not to be faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Precision = Literal["highest", "exact", "fast"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# Components of unit vectors times this stay below float16's largest number, and their rounding errors above its
# smallest normal number.
_UNIT_SCALE = 4096.0


#: In elements: 16-bit units prefer rows of a matrix that begin at multiples of 16 bytes.
ALIGNMENT = 8
# Terms of a sum within one product of `exact`: the error of a GPU's 16-bit units grows with the length of a sum.
# (Measured on an H100, relative to the largest number: 3e-5 after 65,536 terms.)
_LONGEST_SUM = 1 << 14


def default_precision(device: torch.device) -> Precision:
    """Return ``exact`` on an NVIDIA GPU with bfloat16 units (Ampere or later), ``highest`` elsewhere.

    On an H100 at dimension 512 the split products of ``exact`` run at about 150 to 220 useful TFLOP/s, those of float32
    at 50, and both keep within 1e-5 of float64.
    """
    has_units = device.type == "cuda" and torch.version.hip is None
    return "exact" if has_units and torch.cuda.get_device_capability(device) >= (8, 0) else "highest"


@dataclass(frozen=True)
class LogitEmbeddings:
    """Embeddings as an operand of the logits, which are the product times ``factor``."""

    values: Tensor  # [B, D], or [B, 3·D]
    factor: float


@dataclass(frozen=True)
class SplitMatrix:
    """A matrix [m, k] as the sum of matrices of fewer bits, stacked with the highest last."""

    values: Tensor  # [parts·m, k]
    parts: int

    @property
    def high(self) -> Tensor:
        """The highest part, [m, k]; the whole matrix if there is one part."""
        return self.values if self.parts == 1 else self.values[len(self.values) // 2 :]

    @property
    def low(self) -> Tensor:
        """The rest, [m, k], of two parts."""
        assert self.parts == 2, "there is one part"
        return self.values[: len(self.values) // 2]

    def masked(self, mask: Tensor) -> SplitMatrix:
        """Return the matrix times ``mask`` [m, k] bool."""
        stacked = self.values.view(self.parts, *mask.shape) * mask
        return SplitMatrix(stacked.view_as(self.values), self.parts)


@dataclass(frozen=True)
class WeightedEmbeddings:
    """Embeddings [B, D] as an operand of the rows' gradient, each part repeated for each part of the other operand."""

    high: Tensor  # [parts·B, D]
    low: Tensor | None = None  # [parts·B, D]; None for a single part
    lowest: Tensor | None = None  # [B, D] what the two leave, for the highest part of the other operand alone


class Products:
    """Forms the products of a step.

    ======== ================================ ==================================== =========================
    ..       logits                           gradients                            error (see the docs)
    ======== ================================ ==================================== =========================
    highest  float32                          float32                              float32's
    exact    two float16 per number           two bfloat16 per number (three [1])  1e-5
    fast     float16                          bfloat16                             loss 5e-4, gradients 3e-3
    ======== ================================ ==================================== =========================

    [1] of the embeddings, in the rows' gradient.

    Args:
        precision: row of this table.
        dtype: of results and, for ``highest``, of operands. float64 always takes ``highest``.
    """

    def __init__(self, precision: Precision, dtype: torch.dtype) -> None:
        self.precision: Precision = "highest" if dtype is torch.float64 else precision
        self.dtype = dtype
        #: Operands have 16 bits, and those of the logits must be unit vectors.
        self.half = self.precision != "highest"
        self.parts = 2 if self.precision == "exact" else 1

    @property
    def bytes_per_logit(self) -> int:
        """Bytes of a logit's derivative as an operand, beside the derivative itself; 0 if it is its own operand."""
        return 2 * self.parts * self.half

    @property
    def bytes_per_weight(self) -> int:
        """Most bytes of a weight as an operand, beside the weight itself."""
        return 2 * (3 if self.parts == 2 else 1) * self.half

    # --- logits -------------------------------------------------------------------------------------------------------

    def logit_embeddings(self, embeddings: Tensor, scale: float) -> LogitEmbeddings:
        """Prepare embeddings [B, D], unit vectors if :attr:`half`, for logits ``scale·x·wᵀ``; once per step."""
        if not self.half:
            return LogitEmbeddings(embeddings if scale == 1.0 else embeddings * scale, 1.0)
        factor = scale / _UNIT_SCALE**2
        if self.parts == 1:
            return LogitEmbeddings(_scaled_half(embeddings), factor)
        high = _scaled_half(embeddings)
        low = torch.sub(embeddings * _UNIT_SCALE, high, out=torch.empty_like(high))
        # Small terms first, since larger sums lose more. `logit_weights` negates the factor of −high.
        return LogitEmbeddings(torch.cat((low, -high, high), dim=1), factor)

    def logit_weights(self, weights: Tensor) -> Tensor:
        """Prepare weights [n, D], unit vectors if :attr:`half`, for :meth:`logits`: [n, D] or [n, 3·D]."""
        if self.parts == 1:
            return _scaled_half(weights) if self.half else weights
        n, dim = weights.shape
        parts = weights.new_empty(n, 3, dim, dtype=torch.float16)
        high = torch.mul(weights, _UNIT_SCALE, out=parts[:, 2])
        torch.sub(high, weights, alpha=_UNIT_SCALE, out=parts[:, 1])
        parts[:, 0] = high
        return parts.view(n, 3 * dim)

    def logits(self, embeddings: LogitEmbeddings, weights: Tensor, out: Tensor) -> Tensor:
        """Write the logits of a batch against prepared ``weights`` of n classes to ``out`` [B, n]; return it."""
        return _product(embeddings.values, weights.t(), out, factor=embeddings.factor)

    # --- gradients ----------------------------------------------------------------------------------------------------

    def split(self, matrix: Tensor) -> SplitMatrix:
        """Prepare a matrix [m, k] for a gradient."""
        if not self.half:
            return SplitMatrix(matrix, 1)
        values = _space(matrix, self.parts)
        split = SplitMatrix(values, self.parts)
        split.high.copy_(matrix)
        if self.parts == 2:
            torch.sub(matrix, split.high, out=split.low)
        return split

    def split_exp(self, logits: Tensor) -> SplitMatrix:
        """Prepare exp(``logits``), which may be overwritten, for a gradient."""
        if self.half and self.parts == 1:  # rounded where it is computed, which saves a pass
            return SplitMatrix(torch.exp(logits, out=_space(logits, 1)), 1)
        return self.split(logits.exp_())

    def add_embedding_grad(self, grad: SplitMatrix, weights: SplitMatrix, out: Tensor) -> None:
        """Add ``grad·weights``, of [B, n] and [n, D], to ``out`` [B, D]."""
        if self.parts == 1:
            _product(grad.values, weights.values, out, add=True)
            return
        for start in range(0, len(weights.high), _LONGEST_SUM):
            rows = slice(start, start + _LONGEST_SUM)
            _product(grad.low[:, rows], weights.low[rows], out, add=True)
            _product(grad.low[:, rows], weights.high[rows], out, add=True)
            _product(grad.high[:, rows], weights.low[rows], out, add=True)
            _product(grad.high[:, rows], weights.high[rows], out, add=True)

    def weighted_embeddings(self, embeddings: Tensor) -> WeightedEmbeddings:
        """Prepare embeddings [B, D] for :meth:`weight_grad`; once per step."""
        split = self.split(embeddings)
        if self.parts == 1:
            return WeightedEmbeddings(split.values)
        # If one sample makes the gradient of a class, nothing averages out the errors of two parts: there is a third.
        lowest = _space(embeddings, 1).copy_((embeddings - split.high).sub_(split.low))
        return WeightedEmbeddings(torch.cat((split.high, split.high)), torch.cat((split.low, split.low)), lowest)

    def weight_grad(self, grad: SplitMatrix, embeddings: WeightedEmbeddings, out: Tensor | None = None) -> Tensor:
        """Return ``gradᵀ·embeddings``, of [B, n] and [B, D]: [n, D], in ``out`` if there is one."""
        if out is None:
            out = embeddings.high.new_empty(grad.values.shape[1], embeddings.high.shape[1], dtype=self.dtype)
        _product(grad.values.t(), embeddings.high, out)
        if embeddings.low is not None:
            _product(grad.values.t(), embeddings.low, out, add=True)
        if embeddings.lowest is not None:
            _product(grad.high.t(), embeddings.lowest, out, add=True)
        return out


def padded(columns: int) -> int:
    """Return the row length of a matrix in memory for which 16-bit units are fast."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


def _space(matrix: Tensor, parts: int) -> Tensor:
    """Return space for the ``parts`` of a matrix [m, k] in bfloat16, [parts·m, k]."""
    rows, columns = matrix.shape
    return matrix.new_empty(parts * rows, padded(columns), dtype=torch.bfloat16)[:, :columns]


def _scaled_half(unit_vectors: Tensor) -> Tensor:
    return torch.mul(unit_vectors, _UNIT_SCALE, out=torch.empty_like(unit_vectors, dtype=torch.float16))


def _product(left: Tensor, right: Tensor, out: Tensor, add: bool = False, factor: float = 1.0) -> Tensor:
    """Write ``factor·left·right`` to ``out``, or add it; of 16-bit matrices, with sums in ``out``'s float32."""
    if left.dtype is not out.dtype:
        if left.device.type == "cuda":
            return torch.addmm(out, left, right, out_dtype=out.dtype, beta=float(add), alpha=factor, out=out)
        left, right = left.to(out.dtype), right.to(out.dtype)
    if add:
        return out.addmm_(left, right, alpha=factor)
    torch.mm(left, right, out=out)
    return out if factor == 1.0 else out.mul_(factor)
