"""Choice of the algorithms with which a GPU computes: the fastest, or those that repeat every bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Let cuDNN choose the fastest algorithms inside the context, or all of torch deterministic ones.

    An operation without a deterministic algorithm then raises RuntimeError, with its name. On a CPU nothing changes:
    with the same number of threads its results repeat anyway.
    """
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    before = cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    filled_before = memory.fill_uninitialized_memory  # type: ignore[attr-defined]  # not in torch's stubs
    cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds faults, costs time
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before[:2]
        torch.use_deterministic_algorithms(before[2])
        memory.fill_uninitialized_memory = filled_before  # type: ignore[attr-defined]
