"""Time of a training step, by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

PHASES = ("data", "forward", "head", "backward", "update")
START = "start"


class PhaseClock:
    """Sums the time between marks, by phase; on a GPU with events, which do not make the host wait within a step.

    Args:
        on_enter: called with the name of each phase that begins.
    """

    def __init__(self, device: torch.device, on_enter: Callable[[str], None] = lambda phase: None) -> None:
        self._on_enter = on_enter
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begin the first phase of a step; the time since the last mark belongs to no phase."""
        self._on_enter(PHASES[0])
        self._mark(START)

    def end(self, phase: str) -> None:
        """End ``phase``, one of :data:`PHASES`, and begin the next."""
        self._on_enter(PHASES[(PHASES.index(phase) + 1) % len(PHASES)])
        self._mark(phase)

    def _mark(self, phase: str) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Return the seconds in each phase since the last reading. On a GPU the host waits."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            if phase != START:
                seconds[phase] += before.elapsed_time(after) / 1e3 if self._on_gpu else after - before
        self._marks.clear()
        return dict(seconds)
