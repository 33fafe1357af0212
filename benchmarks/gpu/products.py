"""Ways to multiply float32 matrices: in one format, or split into two 16-bit parts each.

A split product ``(h + l)(h' + l')`` leaves out ``l·l'``: three products of 16-bit matrices, added up in float32, which
together keep twice the bits. Parts are scaled by powers of two so that fp16 holds the low ones at full precision; the
reader of the result applies its scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_PART = 1024.0  # of an fp16 matrix after scaling: far below 65504, and its low part is still a normal number


@dataclass(frozen=True)
class Prepared:
    """A product whose operands are already converted."""

    multiply: Callable[[], Tensor]
    factor: float = 1.0  # to multiply its result by


Format = Callable[[Tensor, Tensor], Prepared]


@contextmanager
def tf32_products() -> Iterator[None]:
    """Let products of float32 matrices use TF32 inside the context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product_into_float32(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` of 16-bit matrices, summed in float32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # exact products too


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``total + left @ right`` in float32, of 16-bit ``left`` and ``right``, in one call."""
    if left.is_cuda:
        return torch.addmm(total, left, right, out_dtype=torch.float32)
    return total + product_into_float32(left, right)


def plain(dtype: torch.dtype) -> Format:
    """Multiply operands in ``dtype`` into a result in ``dtype``."""

    def prepare(left: Tensor, right: Tensor) -> Prepared:
        left, right = left.to(dtype), right.to(dtype)
        return Prepared(lambda: left @ right)

    return prepare


def tf32(left: Tensor, right: Tensor) -> Prepared:
    """Multiply float32 operands as TF32 into a float32 result."""

    def multiply() -> Tensor:
        with tf32_products():
            return left @ right

    return Prepared(multiply)


def into_float32(dtype: torch.dtype) -> Format:
    """Multiply operands in ``dtype`` into a float32 result."""

    def prepare(left: Tensor, right: Tensor) -> Prepared:
        left, right = left.to(dtype), right.to(dtype)
        return Prepared(lambda: product_into_float32(left, right))

    return prepare


def split(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Return high and low part of ``matrix`` times a power of two, and that power; bf16 needs no scaling."""
    scale = 1.0
    if dtype is torch.float16:
        scale = 2.0 ** math.floor(math.log2(_LARGEST_PART / float(matrix.abs().max())))
        matrix = matrix * scale
    high = matrix.to(dtype)
    return high, (matrix - high).to(dtype), scale


def concatenated(dtype: torch.dtype, low_first: bool = False) -> Format:
    """Multiply once over three times the inner dimension: ``[h, h, l]·[h', l', h']``, or in the opposite order."""

    def prepare(left: Tensor, right: Tensor) -> Prepared:
        high, low, scale = split(left, dtype)
        other_high, other_low, other_scale = split(right, dtype)
        order = slice(None, None, -1 if low_first else 1)
        wide = _concatenate([high, high, low][order], 1)
        tall = _concatenate([other_high, other_low, other_high][order], 0)
        return Prepared(lambda: product_into_float32(wide, tall), 1.0 / (scale * other_scale))

    return prepare


def three_products(dtype: torch.dtype, in_place: bool) -> Format:
    """Multiply three times, adding in place by a separate pass or in the following product."""

    def prepare(left: Tensor, right: Tensor) -> Prepared:
        high, low, scale = split(left, dtype)
        other_high, other_low, other_scale = split(right, dtype)

        def multiply() -> Tensor:
            total = product_into_float32(low, other_high)
            for first, second in ((high, other_low), (high, other_high)):
                if in_place:
                    total += product_into_float32(first, second)
                else:
                    total = add_product(total, first, second)
            return total

        return Prepared(multiply, 1.0 / (scale * other_scale))

    return prepare


def _concatenate(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenate so that a transposed matrix stays transposed in memory: products prefer some layouts."""
    if parts[0].is_contiguous():
        return torch.cat(parts, dim)
    return torch.cat([part.t() for part in parts], 1 - dim).t()


#: All formats, the most informative first.
FORMATS: dict[str, Format] = {
    "fp32": plain(torch.float32),
    "tf32": tf32,
    "fp16": plain(torch.float16),
    "bf16": plain(torch.bfloat16),
    "fp16, result fp32": into_float32(torch.float16),
    "bf16, result fp32": into_float32(torch.bfloat16),
    "fp16 x3 concatenated": concatenated(torch.float16),
    "fp16 x3 concatenated, low first": concatenated(torch.float16, low_first=True),
    "fp16 x3 mm and add": three_products(torch.float16, in_place=True),
    "fp16 x3 addmm": three_products(torch.float16, in_place=False),
    "bf16 x3 concatenated": concatenated(torch.bfloat16),
    "bf16 x3 mm and add": three_products(torch.bfloat16, in_place=True),
    "bf16 x3 addmm": three_products(torch.bfloat16, in_place=False),
}
