"""Speeds of fused kernels, from prototypes that the package does not use: products with the exponential in their
epilogue, beside cuBLAS and separate passes; a row optimizer in one pass, beside RowSGD and a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from partialfc import RowSGD

from .measure import Bench, Entries, first_line
from .products import concatenated, product_into_float32, split

SCALE = 64.0
_CHECKED = 128  # samples whose sums are compared with float64
_LR, _FRICTION, _DECAY = 0.1, 0.9, 5e-4


@dataclass(frozen=True)
class Tuning:
    """A choice of block shapes for the product kernels."""

    block: tuple[int, int, int]  # samples, classes, numbers of a vector
    warps: int
    stages: int
    tma: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.block))
        return f"{shape}, {self.warps} warps, {self.stages} stages{', tma' if self.tma else ''}"


#: The most promising first: each costs seconds of compilation.
TUNINGS = (
    Tuning((128, 256, 64), 8, 3, tma=True),
    Tuning((128, 128, 64), 4, 3, tma=True),
    Tuning((128, 256, 64), 8, 3),
    Tuning((128, 128, 64), 8, 3),
    Tuning((128, 256, 64), 8, 4, tma=True),
    Tuning((128, 128, 64), 8, 3, tma=True),
    Tuning((64, 256, 64), 4, 3, tma=True),
    Tuning((256, 128, 64), 8, 3, tma=True),
    Tuning((128, 128, 64), 4, 4, tma=True),
    Tuning((128, 128, 64), 4, 3),
    Tuning((64, 256, 64), 4, 3),
    Tuning((256, 128, 64), 8, 3),
    Tuning((128, 128, 128), 8, 2),
)
SMALL_TUNINGS = (Tuning((32, 32, 32), 4, 2), Tuning((32, 32, 32), 4, 2, tma=True))
#: Rows of a block and warps of the row optimizer.
ROW_TUNINGS = ((4, 4), (8, 8), (2, 4), (1, 4), (4, 8), (16, 8))


def run(bench: Bench, entries: Entries) -> None:
    try:
        from . import prototypes
    except ImportError as error:
        entries["prototypes"] = {"skipped": f"triton cannot be imported: {first_line(error)}"}
        return
    row_optimizer(bench, entries, prototypes)
    operands = Operands.random(bench)
    entries.measure("cuBLAS and passes", partial(separate, bench, operands), need=3)
    tunings = SMALL_TUNINGS if bench.small else TUNINGS
    best = sums_without_logits(bench, entries, prototypes, operands, tunings)
    for dtype in (torch.bfloat16, torch.float16):
        for tuning in best[:3]:
            write = partial(exp_product, bench, prototypes, operands, tuning, dtype)
            entries.measure(f"sums, exp stored as {str(dtype)[6:]}: {tuning}", write, need=6)
    split_operands = operands.split()
    for tuning in best[:2]:
        exact = partial(exp_product, bench, prototypes, split_operands, tuning, None)
        entries.measure(f"sums, fp16 x3: {tuning}", exact, need=6)
    for name, entry in entries.items():
        if entry.get("right") is False:
            entries.problems.append(f"the prototype {name} computes something else than torch")


@dataclass(frozen=True)
class Operands:
    """Inputs of the product kernels."""

    x: Tensor  # [B, D], or [B, 3·D] for split products
    w: Tensor  # [n, D]
    scale: float
    shift: Tensor  # [B] the largest logit of each sample
    useful_flops: int
    unit_x: Tensor  # in float32
    unit_w: Tensor

    @classmethod
    def random(cls, bench: Bench) -> Operands:
        batch, rows, dim = (64, 248, 64) if bench.small else (4096, 65536, 512)
        x, w = bench.unit(batch, dim), bench.unit(rows, dim)
        shift = SCALE * (x @ w.t()).amax(dim=1)
        return cls(x.half(), w.half(), SCALE, shift, 2 * batch * rows * dim, x, w)

    def split(self) -> Operands:
        """Return the same in two fp16 parts each, side by side: the kernel then adds up all three products."""
        (high, low, by), (other_high, other_low, other_by) = (
            split(vectors, torch.float16) for vectors in (self.unit_x, self.unit_w)
        )
        x, w = torch.cat([high, high, low], 1), torch.cat([other_high, other_low, other_high], 1)
        scale = self.scale / (by * other_by)
        return Operands(x, w, scale, self.shift, self.useful_flops, self.unit_x, self.unit_w)

    def exponentials(self) -> Tensor:
        """Return the expected results for the first samples, [checked, n] float64, of the operands as given."""
        logits = self.scale * (self.x[:_CHECKED].double() @ self.w.double().t())
        return torch.exp(logits - self.shift[:_CHECKED, None].double())

    def exact_sums(self) -> Tensor:
        """Return the sums of the first samples, [checked] float64, of the operands before rounding to 16 bits."""
        logits = SCALE * (self.unit_x[:_CHECKED].double() @ self.unit_w.double().t())
        return torch.exp(logits - self.shift[:_CHECKED, None].double()).sum(dim=1)


def separate(bench: Bench, operands: Operands) -> dict[str, float]:
    """Measure cuBLAS and separate passes: the product alone, and with exp and row sum; fp16, and x3."""
    x, w = operands.x, operands.w.t()
    product = bench.ms(lambda: product_into_float32(x, w))
    product_16 = bench.ms(lambda: x @ w)
    everything = bench.ms(lambda: product_into_float32(x, w).mul_(SCALE).exp_().sum(dim=1))
    triple = bench.ms(concatenated(torch.float16)(operands.unit_x, operands.unit_w.t()).multiply)
    return {
        "fp16 product TF/s": operands.useful_flops / product / 1e9,
        "fp16 result TF/s": operands.useful_flops / product_16 / 1e9,
        "product ms": product,
        "with passes ms": everything,
        "x3 product ms": triple,
    }


def sums_without_logits(
    bench: Bench, entries: Entries, prototypes: ModuleType, operands: Operands, tunings: tuple[Tuning, ...]
) -> list[Tuning]:
    """Record the row sums for each tuning; return those that work, the fastest first."""
    times: dict[Tuning, float] = {}
    for tuning in tunings:
        name = f"sums: {tuning}"
        found = entries.measure(name, partial(exp_product, bench, prototypes, operands, tuning, None), need=10)
        if found is not None and found["right"]:
            times[tuning] = found["ms"]
    return sorted(times, key=lambda tuning: times[tuning])


def exp_product(
    bench: Bench, prototypes: ModuleType, operands: Operands, tuning: Tuning, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return time and error of one tuning; the exponentials are stored in ``dtype``, or not at all.

    The kernel's own error is that of its sums against float64 sums of the same 16-bit operands. The other one includes
    the rounding of the operands.
    """
    sums = torch.full((len(operands.x),), torch.nan, device=bench.device)
    stored = None
    if dtype is not None:
        stored = torch.full((len(operands.x), len(operands.w)), torch.nan, dtype=dtype, device=bench.device)

    def step() -> None:
        prototypes.exp_row_sums(
            operands.x,
            operands.w,
            operands.scale,
            operands.shift,
            sums,
            stored,
            tuning.block,
            tuning.warps,
            tuning.stages,
            tuning.tma,
        )

    step()  # compiles
    ms = bench.ms(step, seconds=0.5)
    expected = operands.exponentials()
    total = expected.sum(dim=1)
    found = sums[:_CHECKED].double()
    error = float(((found - total).abs() / total).max())
    exact = operands.exact_sums()
    right = error < 1e-4
    if stored is not None:
        largest = float((stored[:_CHECKED].double() - expected).abs().max())  # of at most 1
        right = right and largest < 1e-2 and bool(torch.isfinite(stored).all())
    return {
        "ms": ms,
        "useful TF/s": operands.useful_flops / ms / 1e9,
        "kernel's error": error,
        "with rounding": float(((found - exact).abs() / exact).max()),
        "right": right,
    }


def row_optimizer(bench: Bench, entries: Entries, prototypes: ModuleType) -> None:
    """Record SGD on a tenth of the rows and on all: in one pass, and as RowSGD does it."""
    classes, dim = (1000, 64) if bench.small else (1_000_000, 512)
    for share in (0.1, 1.0):
        chosen = torch.randperm(classes, device=bench.device)[: int(share * classes)].sort().values
        weight, momentum, gradient = (bench.randn(rows, dim) for rows in (classes, classes, len(chosen)))
        name = f"SGD on {share:.0%} of {classes:,} rows"
        entries.measure(f"{name}: RowSGD", partial(row_sgd_as_it_is, bench, weight, gradient, chosen), need=2)
        for block_rows, warps in ROW_TUNINGS[:1] if bench.small else ROW_TUNINGS:
            tensors = (weight, momentum, gradient, chosen)
            one_pass = partial(row_sgd_in_one_pass, bench, prototypes, *tensors, block_rows, warps)
            entries.measure(f"{name}: one pass, {block_rows} rows, {warps} warps", one_pass, need=3)
        del weight, momentum, gradient, tensors, one_pass


def row_sgd_as_it_is(bench: Bench, weight: Tensor, gradient: Tensor, rows: Tensor) -> dict[str, Any]:
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = RowSGD([parameter], lr=_LR, momentum=_FRICTION, weight_decay=_DECAY)
    sparse: Callable[..., Tensor] = torch.sparse_coo_tensor
    parameter.grad = sparse(rows[None], gradient, weight.shape, is_coalesced=True, check_invariants=False)
    ms = bench.ms(optimizer.step)
    return {"ms": ms, "GB/s": 5 * gradient.nbytes / ms / 1e6, "kernel's error": 0.0, "right": True}


def row_sgd_in_one_pass(
    bench: Bench,
    prototypes: ModuleType,
    weight: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    rows: Tensor,
    block_rows: int,
    warps: int,
) -> dict[str, Any]:
    """Return time and error of the prototype, and its traffic: three reads and two writes per number."""
    weight, momentum = weight.clone(), momentum.clone()
    some = rows[:1000]
    new_momentum = _FRICTION * momentum[some] + gradient[:1000] + _DECAY * weight[some]
    new_weight = weight[some] - _LR * new_momentum

    def step() -> None:
        prototypes.row_sgd(weight, momentum, gradient, rows, _LR, _FRICTION, _DECAY, block_rows, warps)

    step()
    error = max(float((weight[some] - new_weight).abs().max()), float((momentum[some] - new_momentum).abs().max()))
    ms = bench.ms(step)
    return {"ms": ms, "GB/s": 5 * gradient.nbytes / ms / 1e6, "kernel's error": error, "right": error < 1e-5}
