"""Prototypes of fused kernels, to learn their speed. The package does not use them.

Written for Triton. All matrices are contiguous; numbers of samples are multiples of ``block_batch``.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its kernels, which may use only its own.

from __future__ import annotations

import math

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

_LOG2_E = math.log2(math.e)


@triton.jit
def _exp_gemm(
    x,  # [batch, dim] 16 bit
    w,  # [classes, dim] 16 bit
    shift,  # [batch] float32, in powers of 2
    sums,  # [batch] float32, zero before
    probabilities,  # [batch, classes] 16 bit, if `write`
    batch,
    classes,
    scale,  # in powers of 2
    dim: tl.constexpr,
    write: tl.constexpr,
    block_batch: tl.constexpr,
    block_classes: tl.constexpr,
    block_dim: tl.constexpr,
):
    """Compute one block of logits, its exponentials, and their sums over its classes."""
    # Neighbours share a block of classes: it comes from memory once, and x stays in the L2 cache.
    blocks = batch // block_batch
    samples = (tl.program_id(0) % blocks) * block_batch + tl.arange(0, block_batch)
    columns = (tl.program_id(0) // blocks) * block_classes + tl.arange(0, block_classes)
    inside = columns < classes
    inner = tl.arange(0, block_dim)
    x_block = x + samples[:, None] * dim + inner[None, :]
    w_block = w + columns[None, :].to(tl.int64) * dim + inner[:, None]
    logits = tl.zeros((block_batch, block_classes), tl.float32)
    for _ in range(0, dim, block_dim):
        logits = tl.dot(tl.load(x_block), tl.load(w_block, mask=inside[None, :], other=0.0), logits)
        x_block += block_dim
        w_block += block_dim
    exponentials = tl.exp2(logits * scale - tl.load(shift + samples)[:, None])
    exponentials = tl.where(inside[None, :], exponentials, 0.0)
    tl.atomic_add(sums + samples, tl.sum(exponentials, 1), sem="relaxed")
    if write:
        out = probabilities + samples[:, None].to(tl.int64) * classes + columns[None, :]
        tl.store(out, exponentials.to(probabilities.dtype.element_ty), mask=inside[None, :])


@triton.jit
def _exp_gemm_tma(
    x,  # descriptor of [batch, dim] 16 bit
    w,  # descriptor of [classes, dim] 16 bit; what lies beyond the last class reads as 0
    shift,
    sums,
    probabilities,  # descriptor of [batch, classes] 16 bit, if `write`
    batch,
    classes,
    scale,
    dim: tl.constexpr,
    write: tl.constexpr,
    block_batch: tl.constexpr,
    block_classes: tl.constexpr,
    block_dim: tl.constexpr,
):
    """Do the same, with blocks fetched and stored by the tensor memory accelerator."""
    blocks = batch // block_batch
    first_sample = (tl.program_id(0) % blocks) * block_batch
    first_class = (tl.program_id(0) // blocks) * block_classes
    logits = tl.zeros((block_batch, block_classes), tl.float32)
    for start in range(0, dim, block_dim):
        logits = tl.dot(x.load([first_sample, start]), w.load([first_class, start]).T, logits)
    samples = first_sample + tl.arange(0, block_batch)
    inside = first_class + tl.arange(0, block_classes) < classes
    exponentials = tl.exp2(logits * scale - tl.load(shift + samples)[:, None])
    exponentials = tl.where(inside[None, :], exponentials, 0.0)
    tl.atomic_add(sums + samples, tl.sum(exponentials, 1), sem="relaxed")
    if write:
        probabilities.store([first_sample, first_class], exponentials.to(probabilities.dtype))


@triton.jit
def _row_sgd(
    weight,  # [rows of the shard, dim]
    momentum,  # [rows of the shard, dim]
    gradient,  # [count, dim]
    rows,  # [count] int64
    count,
    lr,
    decay,
    friction,
    dim: tl.constexpr,
    block_rows: tl.constexpr,
):
    """Apply v ← friction·v + g + decay·w; w ← w − lr·v to the rows with a gradient."""
    number = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    inside = number < count
    row = tl.load(rows + number, mask=inside, other=0)
    columns = tl.arange(0, dim)[None, :]
    place = row[:, None] * dim + columns
    mask = inside[:, None]
    w = tl.load(weight + place, mask=mask)
    v = tl.load(momentum + place, mask=mask)
    g = tl.load(gradient + number.to(tl.int64)[:, None] * dim + columns, mask=mask)
    v = friction * v + g + decay * w
    tl.store(momentum + place, v, mask=mask)
    tl.store(weight + place, w - lr * v, mask=mask)


def exp_row_sums(
    x: Tensor,  # [B, D] 16 bit
    w: Tensor,  # [n, D] 16 bit
    scale: float,
    shift: Tensor,  # [B] float32
    sums: Tensor,  # [B] float32: set to Σ_j exp(scale·x·w_j − shift)
    probabilities: Tensor | None,  # [B, n] 16 bit: set to the terms, if given
    block: tuple[int, int, int],  # of samples, classes and numbers of a vector
    warps: int,
    stages: int,
    tma: bool = False,
) -> None:
    """Sum the exponentials of the logits without storing a logit."""
    block_batch, block_classes, block_dim = block
    (batch, dim), classes = x.shape, len(w)
    sums.zero_()
    grid = (batch // block_batch * triton.cdiv(classes, block_classes),)
    arguments = (batch, classes, scale * _LOG2_E, dim, probabilities is not None, *block)
    out = x if probabilities is None else probabilities  # something has to be passed
    shift = shift * _LOG2_E
    if tma:
        from triton.tools.tensor_descriptor import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
            TensorDescriptor,
        )

        out_block = [block_batch, block_dim if probabilities is None else block_classes]
        described = (
            TensorDescriptor.from_tensor(x, [block_batch, block_dim]),
            TensorDescriptor.from_tensor(w, [block_classes, block_dim]),
            shift,
            sums,
            TensorDescriptor.from_tensor(out, out_block),
        )
        _exp_gemm_tma[grid](*described, *arguments, num_warps=warps, num_stages=stages)
    else:
        _exp_gemm[grid](x, w, shift, sums, out, *arguments, num_warps=warps, num_stages=stages)


def row_sgd(
    weight: Tensor,  # [rows of the shard, D]
    momentum: Tensor,  # [rows of the shard, D]
    gradient: Tensor,  # [n, D]
    rows: Tensor,  # [n] int64, each once
    lr: float,
    friction: float,
    decay: float,
    block_rows: int,
    warps: int,
) -> None:
    """Take a step of SGD with momentum on some rows, in one pass: three reads and two writes per number."""
    count, dim = gradient.shape
    grid = (triton.cdiv(count, block_rows),)
    _row_sgd[grid](weight, momentum, gradient, rows, count, lr, decay, friction, dim, block_rows, num_warps=warps)
