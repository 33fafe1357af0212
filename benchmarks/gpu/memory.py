"""Memory over many steps with a changing sample rate, and the number of classes that fit."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from partialfc import StepRate

from .measure import GIB, Bench, Entries
from .steps import HeadStep, head_seconds, short

BATCH, RATE = 1024, 0.1
_BUDGET_MB = 256
_STEPS, _CHANGES = 200, (0, 50, 100, 150)
_RATES = (0.05, 0.1, 0.2, 0.1)
_SPARE = 2 * GIB  # for the CUDA context, cuBLAS, the batch and fragmentation
_MAKING_SECONDS = 0.5e-6  # per class, where it could not be measured


def run(bench: Bench, entries: Entries) -> None:
    dim = 64 if bench.small else 512
    classes = 20_000 if bench.small else 4_000_000
    seconds = _STEPS * head_seconds(max(_RATES) * classes, BATCH)
    long_run = entries.measure("making", partial(schedule, bench, entries, classes, dim), need=seconds)
    making = long_run["seconds"] / classes if long_run else _MAKING_SECONDS
    if bench.small:
        return
    for name, dtype in {"fp32 weight and momentum": torch.float32, "bf16 weight and momentum": torch.bfloat16}.items():
        fits = planned_classes(bench, dim, dtype)
        need = 2 * making * fits + 8 * head_seconds(RATE * fits, BATCH)
        entries.measure(f"most classes, {name}", partial(largest, bench, fits, dim, dtype), need)


def schedule(bench: Bench, entries: Entries, classes: int, dim: int) -> dict[str, float]:
    """Train for 200 steps while the sample rate rises and falls; record allocated and reserved memory on the way."""
    started = time.perf_counter()
    step = HeadStep(bench, classes, dim, BATCH, sample_rate=StepRate(_RATES, _CHANGES), memory_budget_mb=_BUDGET_MB)
    bench.wait()
    made = time.perf_counter() - started
    bench.reset_peak()
    for number in range(_STEPS):
        step()
        if number in (2, 49, 99, 149, 199):
            bench.wait()
            entries[f"{short(classes)} classes, after step {number}"] = _usage(bench)
            bench.reset_peak()
        if bench.lacks(5):
            entries["not all steps"] = f"{number + 1} of {_STEPS}: no time left"
            break
    return {"classes": classes, "seconds": made}


def _usage(bench: Bench) -> dict[str, float]:
    statistics = torch.cuda.memory_stats(bench.device)
    return {
        "allocated GiB": statistics["allocated_bytes.all.current"] / GIB,
        "at the peak GiB": statistics["allocated_bytes.all.peak"] / GIB,
        "reserved GiB": statistics["reserved_bytes.all.current"] / GIB,
        "allocations of the device": statistics.get("num_device_alloc", -1),
        "retries": statistics["num_alloc_retries"],
    }


def planned_classes(bench: Bench, dim: int, dtype: torch.dtype) -> int:
    """Estimate the number of classes that fit into the free memory, with RowSGD and a sampled tenth."""
    bench.free()
    free, _ = torch.cuda.mem_get_info(bench.device)
    stored = 2 * dim * dtype.itemsize  # weight and momentum
    working = RATE * (dim * 4 + 4 * 8)  # gradients of the sampled rows, and their numbers
    return int((free - _SPARE - _BUDGET_MB * 2**20) / (stored + working))


def largest(bench: Bench, planned: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Take three steps at the planned number of classes; if they do not fit, at 10 % less."""
    found: dict[str, Any] = {"planned": planned, "fits": False, "tried less": None, "ms": None, "peak GiB": None}
    for classes in (planned, int(0.9 * planned)):
        try:
            step = HeadStep(
                bench, classes, dim, BATCH, sample_rate=RATE, weight_dtype=dtype, memory_budget_mb=_BUDGET_MB
            )
            bench.reset_peak()
            times = bench.times(step, repeats=2)
        except torch.OutOfMemoryError:
            found["tried less"] = "no"
        else:
            found["tried less"] = None if classes == planned else f"{classes:,} fit"
            return {**found, "fits": classes == planned, "ms": min(times), "peak GiB": bench.peak_gib()}
        step = None  # type: ignore[assignment]  # release the weight before the next try
        bench.free()
    return found
