"""Time a step beside research code and beside the bare products, in the same process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from .correctness import precision_modes
from .measure import Bench, Entries, PhasedStep
from .steps import HeadStep, PlainStep, bare_products_ms, head_seconds, short

_RUNS = 5  # of a step: two to warm up, at least two that are timed, and some room
_DENSE_SECONDS = 25e-9  # per class that dense SGD walks
_MAKING_SECONDS = 0.5e-6  # per class, for creating a head and its first step


@dataclass(frozen=True)
class Size:
    classes: int
    rate: float
    batches: tuple[int, ...] = (1024, 4096)

    def name(self, batch: int) -> str:
        return f"{short(self.classes)}, rate {self.rate}, B {batch}"

    @property
    def active(self) -> int:
        """Number of active rows."""
        return int(self.rate * self.classes)


SIZES = (
    Size(1_000_000, 0.1),
    Size(1_000_000, 1.0),
    Size(10_000_000, 0.1),
    Size(4_000_000, 0.1),
    Size(10_000_000, 1.0),
    Size(4_000_000, 1.0),
)
BUDGETS_MB = (1024, 4096)  # besides the default: with more of it, backward reuses what forward has formed
SMALL_SIZES = (Size(4000, 0.1, (16, 64)), Size(4000, 1.0, (16,)))


def run(bench: Bench, entries: Entries) -> None:
    dim = 64 if bench.small else 512
    modes = precision_modes()
    for size in SMALL_SIZES if bench.small else SIZES:
        for mode in modes:
            heads(bench, entries, size, dim, mode)
        budgets = BUDGETS_MB[:1] if bench.small else BUDGETS_MB if size.classes <= 1_000_000 else ()
        for budget, mode in product(budgets, modes[-2:]):
            heads(bench, entries, size, dim, mode, budget)
        for batch in size.batches:
            others(bench, entries, size, dim, batch)
    add_ratios(entries, modes[0])


def _head_name(size: Size, batch: int, mode: str | None, budget_mb: int | None = None) -> str:
    mode_and_budget = [mode] if mode else []
    if budget_mb:
        mode_and_budget.append(f"{budget_mb} MiB")
    return ", ".join([f"{size.name(batch)}: head", *mode_and_budget])


def heads(bench: Bench, entries: Entries, size: Size, dim: int, mode: str | None, budget_mb: int | None = None) -> None:
    """Record the times of this package's head at both batch sizes; one head serves all of them."""
    made: list[HeadStep] = []
    options: dict[str, Any] = {"sample_rate": size.rate} | ({} if mode is None else {"matmul_precision": mode})
    if budget_mb is not None:
        options["memory_budget_mb"] = budget_mb

    def step(batch: int) -> HeadStep:
        if not made:
            made.append(HeadStep(bench, size.classes, dim, batch, **options))
        made[0].set_batch(batch)
        return made[0]

    for batch in size.batches:
        need = _RUNS * head_seconds(size.active, batch) + (0 if made else _MAKING_SECONDS * size.classes)
        entries.measure(_head_name(size, batch, mode, budget_mb), partial(timed, bench, partial(step, batch)), need)


def others(bench: Bench, entries: Entries, size: Size, dim: int, batch: int) -> None:
    """Record the bare products and the plain heads."""
    name = size.name(batch)
    for sixteen_bit in (False, True):
        products = partial(bare_products_ms, bench, size.active, dim, batch, sixteen_bit)
        label = f"{name}: 4 products, {'16 bit' if sixteen_bit else 'fp32'}"
        entries.measure(label, partial(products_alone, products))
    need = _RUNS * (1.5 * head_seconds(size.active, batch) + _DENSE_SECONDS * size.classes)
    for fp16 in (False, True):
        make = partial(PlainStep, bench, size.classes, dim, batch, size.rate, fp16)
        entries.measure(f"{name}: plain, {'fp16' if fp16 else 'fp32'}", partial(timed, bench, make), need)


def timed(bench: Bench, make: Callable[[], PhasedStep]) -> dict[str, Any]:
    """Return the times of a step and its parts, and its peak of memory."""
    step = make()
    bench.reset_peak()
    found = bench.phases(step)
    return {**found, "peak GiB": bench.peak_gib(), "x head": None}


def products_alone(products: Callable[[], float]) -> dict[str, Any]:
    empty = dict.fromkeys(("forward", "backward", "update", "spread %", "peak GiB", "x head"))
    return {"ms": products(), **empty}


def add_ratios(entries: Entries, mode: str | None) -> None:
    """Record the time of each over the head's at the same size; below 1 it is faster."""
    for name, entry in entries.items():
        size = name.split(":")[0]
        head = entries.get(f"{size}: head{f', {mode}' if mode else ''}", {})
        if "ms" in entry and "ms" in head:
            entry["x head"] = entry["ms"] / head["ms"]
