"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

PHASES = ("data", "forward", "head", "backward", "update")


class PhaseClock:
    """Sums the time between marks, by phase; on a GPU with events, which never make the host wait within a step.

    Args:
        entered: is told of each phase that begins.
    """

    def __init__(self, device: torch.device, entered: Callable[[str], None] = lambda phase: None) -> None:
        self._entered = entered
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Say that ``phase`` ends now, one of PHASES; a mark called "start" only starts the clock."""
        self._entered(PHASES[(PHASES.index(phase) + 1) % len(PHASES)] if phase in PHASES else PHASES[0])
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def read(self, start: str) -> dict[str, float]:
        """Seconds of each phase since the last reading; the marks called ``start`` begin, and end nothing."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            if phase != start:
                seconds[phase] += before.elapsed_time(after) / 1e3 if self._on_gpu else after - before
        self._marks.clear()
        return dict(seconds)
