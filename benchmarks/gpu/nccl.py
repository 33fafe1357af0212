"""Compare a group of one rank with a single process, and measure the cost of its collectives."""

from __future__ import annotations

import statistics
import tempfile
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from .cases import SMALL, USUAL, Case, Outcome, run_case
from .correctness import EXACT_TOLERANCE
from .measure import Bench, Entries
from .steps import HeadStep

_RATES = (0.1, 1.0)


def run(bench: Bench, entries: Entries) -> None:
    alone = {rate: outcome(bench, rate) for rate in _RATES}
    times = {rate: step_ms(bench, rate) for rate in _RATES}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if bench.cuda else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=60),
            device_id=bench.device if bench.cuda else None,
        )
        try:
            for rate in _RATES:
                compared = partial(compare, bench, rate, alone[rate], times[rate])
                found = entries.measure(f"rate {rate}, {dist.get_backend()}", compared)
                if found is not None and max(found["loss"], found["weight"]) > EXACT_TOLERANCE:
                    entries.problems.append(f"rate {rate}: a group of one rank gives other numbers than no group")
        finally:
            dist.destroy_process_group()


def outcome(bench: Bench, rate: float) -> Outcome:
    case = Case("arcface with center loss", rate=rate, center_loss=True)
    return run_case(case, SMALL if bench.small else USUAL, bench.device, exact=False)


def step_ms(bench: Bench, rate: float) -> float:
    """Return the median milliseconds of a step, of twenty if there is time."""
    classes, dim, batch = (4000, 64, 16) if bench.small else (1_000_000, 512, 1024)
    found = statistics.median(bench.times(HeadStep(bench, classes, dim, batch, sample_rate=rate), repeats=20))
    bench.free()
    return found


def compare(bench: Bench, rate: float, alone: Outcome, alone_ms: float) -> dict[str, Any]:
    errors = outcome(bench, rate).errors(alone)
    ms = step_ms(bench, rate)
    return {**errors, "alone ms": alone_ms, "in a group ms": ms, "ratio": ms / alone_ms}
