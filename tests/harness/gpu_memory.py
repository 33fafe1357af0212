"""Memory that a model of a GPU's allocator reserves for a head: ``python -m tests.harness.gpu_memory STEPS NAME…``.

Printed is a JSON object: for each named schedule of the sample rate, the largest reserved over the largest allocated
memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from unittest.mock import patch

import torch

from partialfc import PartialFC, RowSGD, losses
from partialfc.head.optim import working_rows
from partialfc.head.sample_rate import LinearRate, SampleRate, StepRate
from partialfc.head.softmax import class_chunks, sampling
from tests.harness.caching_allocator import CachingAllocator, following
from tests.harness.simulated_gpu import simulated_gpu, to_gpu

CLASSES, DIM, BATCH = 20_000, 64, 8
SCALE = 128  # of all sizes: that of a million classes of 164 dimensions


def reserved(rate: SampleRate, steps: int) -> float:
    """Return reserved by allocated memory at their peaks, parameters aside."""
    allocator = CachingAllocator(SCALE)
    with simulated_gpu():
        head = PartialFC(
            CLASSES,
            DIM,
            losses.ArcFace(),
            sample_rate=rate,
            memory_budget_mb=1,
            matmul_precision="highest",
            device="cuda",
        )
        optimizer = RowSGD(head.parameters(), lr=0.1)
        with (
            patch.object(working_rows, "_GPU_PIECE", working_rows._GPU_PIECE // SCALE),
            patch.object(class_chunks, "_GPU_CHUNK_ELEMENTS", class_chunks._GPU_CHUNK_ELEMENTS // SCALE),
            patch.object(sampling, "_GPU_PIECE", sampling._GPU_PIECE // SCALE),
            following(allocator),
        ):
            for _ in range(steps):
                embeddings, labels = torch.randn(BATCH, DIM), torch.randint(0, CLASSES, (BATCH,))
                head(to_gpu(embeddings).requires_grad_(), to_gpu(labels)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return allocator.most_reserved / allocator.most_allocated


def schedules(steps: int) -> dict[str, SampleRate]:
    rising = LinearRate(0.1, 1.0, steps)
    unnamed: Callable[[int], float] = lambda step: rising(step)  # noqa: E731 (a function without a `largest`)
    return {
        "constant": 0.3,
        "rising": rising,
        "falling": LinearRate(1.0, 0.1, steps),
        "in steps": StepRate([0.1, 0.3, 1.0], [0, steps // 3, 2 * steps // 3]),
        "unnamed": unnamed,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = int(sys.argv[1])
    rates = schedules(steps)
    print(json.dumps({name: reserved(rates[name], steps) for name in sys.argv[2:]}))
