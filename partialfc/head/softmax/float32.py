"""Products of float32 matrices in full float32, even if the process allows TF32 or bfloat16 for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_REDUCED = ("tf32", "bf16")
_lock = Lock()
_users = 0  # blocks under way, in all threads
_saved: list[tuple[Any, str, Any]] = []  # settings to restore when the last one ends


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products of float32 matrices, and sums of float16 products, in float32 within this block.

    The settings belong to the process, so products of other threads are in float32 meanwhile. They are restored when
    the last thread leaves such a block.
    """
    global _users
    with _lock:
        if not _users:
            _save_settings()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _restore_settings()


def _save_settings() -> None:
    """Save and change settings below float32; usually there are none."""
    cuda: Any = torch.backends.cuda.matmul
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # its stub lacks it
    for backend, name, wanted in (
        (cuda, "fp32_precision", "ieee"),
        (cpu, "fp32_precision", "ieee"),
        (cuda, "allow_fp16_accumulation", False),
    ):
        value = getattr(backend, name)
        if value in _REDUCED or value is True:
            _saved.append((backend, name, value))
            setattr(backend, name, wanted)


def _restore_settings() -> None:
    while _saved:
        backend, name, value = _saved.pop()
        setattr(backend, name, value)
