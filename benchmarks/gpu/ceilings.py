"""Best speeds of this device: copies, products at the head's shapes, passes over logits, launches, waits.

A head step consists of these products, of B embeddings x and n rows w of D numbers, and of passes over [B, n]:

    logits = x·wᵀ        dX = p·w        dW = pᵀ·x        with p = exp(logits), up to a factor per sample
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .measure import Bench, Entries
from .products import FORMATS, Format, split

SCALE = 64.0  # of the logits that p comes from
_SLICES = {"logits": 256, "dX": 64, "dW": 2048}  # rows of each result that are compared with float64


def run(bench: Bench, entries: Entries) -> None:
    entries.measure("device-to-device copy", partial(copy, bench))
    entries.measure("index_select of sorted random rows", partial(gather, bench))
    entries.measure("kernel launch", partial(launch, bench))
    entries.measure("host wait", partial(host_wait, bench))
    shapes = [(64, 512)] if bench.small else [(4096, 65536), (1024, 102400), (4096, 102400), (1024, 65536)]
    for position, (batch, rows) in enumerate(shapes):
        if bench.lacks(3):
            entries[f"B {batch}, n {rows}"] = {"skipped": "no time left"}
            continue
        operands = Operands.random(bench, batch, rows, dim=64 if bench.small else 512)
        for name, prepare in FORMATS.items():
            products = partial(measure_products, bench, operands, prepare)
            entries.measure(f"B {batch}, n {rows}, {name}", products, need=2)
        del operands, products
        bench.free()
        if position == 0:
            entries.measure("passes over the logits", partial(passes, bench, batch, rows), need=3)
            entries.measure("splitting rows into bf16 parts", partial(split_rows, bench, rows), need=2)


def copy(bench: Bench) -> dict[str, float]:
    """Measure a large copy, counting bytes read and bytes written."""
    source = bench.randn(2**18 if bench.small else 2**28)
    target = torch.empty_like(source)
    return _bandwidth(bench.ms(lambda: target.copy_(source)), 2 * source.nbytes)


def gather(bench: Bench) -> dict[str, float]:
    """Measure 100,000 random rows of a million, as a sampled step reads them."""
    classes, count, dim = (10_000, 1_000, 64) if bench.small else (1_000_000, 100_000, 512)
    table = bench.randn(classes, dim)
    rows = torch.randperm(classes, device=bench.device)[:count].sort().values
    out = bench.randn(count, dim)
    return _bandwidth(bench.ms(lambda: torch.index_select(table, 0, rows, out=out)), 2 * out.nbytes)


def _bandwidth(ms: float, moved: int) -> dict[str, float]:
    return {"ms": ms, "GB/s": moved / ms / 1e6}


def launch(bench: Bench) -> dict[str, float]:
    """Repeat a tiny kernel: the host's share of each, and the time until all are done."""
    tiny, count = bench.randn(1), 200 if bench.small else 3000
    tiny.add_(1.0)
    bench.wait()
    started = time.perf_counter()
    for _ in range(count):
        tiny.add_(1.0)
    queued = time.perf_counter()
    bench.wait()
    done = time.perf_counter()
    return {"host us": 1e6 * (queued - started) / count, "us": 1e6 * (done - started) / count}


def host_wait(bench: Bench) -> dict[str, float]:
    """Measure reading one number back while nothing else is queued, beside the kernel alone."""
    tiny = bench.randn(1)
    seconds = []
    for _ in range(50):
        bench.wait()
        started = time.perf_counter()
        tiny.add_(1.0).item()
        seconds.append(time.perf_counter() - started)
    return {"us": 1e6 * sorted(seconds)[len(seconds) // 2], "slowest us": 1e6 * max(seconds)}


@dataclass(frozen=True)
class Operands:
    """Operands of the three products, and slices of their float64 results."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    expected: dict[str, Tensor]

    @classmethod
    def random(cls, bench: Bench, batch: int, rows: int, dim: int) -> Operands:
        x, w = bench.unit(batch, dim), bench.unit(rows, dim)
        p = (x @ w.t()).mul_(SCALE)
        p.sub_(p.amax(dim=1, keepdim=True)).exp_()
        pairs = {"logits": (x, w.t()), "dX": (p, w), "dW": (p.t(), x)}
        expected = {name: left[: _SLICES[name]].double() @ right.double() for name, (left, right) in pairs.items()}
        return cls(pairs, expected)


def measure_products(bench: Bench, operands: Operands, prepare: Format) -> dict[str, Any]:
    """Return teraflops of the useful product (2·B·n·D) and errors relative to the largest exact result."""
    speeds: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, (left, right) in operands.pairs.items():
        prepared = prepare(left, right)
        flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
        speeds[f"{name} TF/s"] = flops / bench.ms(prepared.multiply, seconds=0.5) / 1e9
        expected = operands.expected[name]
        error = prepared.multiply()[: len(expected)].double() * prepared.factor - expected
        errors[f"{name} rms"] = float(error.square().mean().sqrt() / expected.abs().max())
        errors[f"{name} max"] = float(error.abs().max() / expected.abs().max())
        del prepared, error
    return {**speeds, **errors}


def passes(bench: Bench, batch: int, rows: int) -> dict[str, float]:
    """Measure passes over float32 logits [B, n], in milliseconds; each reads 4·B·n bytes, and exp writes as many."""
    logits = bench.randn(batch, rows)
    out = torch.empty_like(logits)
    exp = bench.ms(lambda: torch.exp(logits, out=out))
    row_sum = bench.ms(lambda: out.sum(dim=1))
    half = bench.ms(lambda: out.to(torch.bfloat16))
    return {
        "exp ms": exp,
        "row sum ms": row_sum,
        "to bf16 ms": half,
        "logsumexp ms": bench.ms(lambda: torch.logsumexp(logits, dim=1)),
        "exp and row sum GB/s": 3 * logits.nbytes / (exp + row_sum) / 1e6,
    }


def split_rows(bench: Bench, rows: int) -> dict[str, float]:
    """High and low part of [n, D] float32 rows by separate passes; a pass that does all reads 4 bytes, writes 4."""
    w = bench.unit(rows, 64 if bench.small else 512)
    return _bandwidth(bench.ms(lambda: split(w, torch.bfloat16)), 2 * w.nbytes)
