"""Find where a step makes the host wait for the device, count its kernels, and measure how busy the device is.

torch warns of most waits, but not of those in torch.sparse and torch.distributed; the profiler's count of CUDA runtime
calls is complete.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.autograd import DeviceType

import partialfc
from partialfc import CenterLoss, RowSGD

from .measure import Bench, Entries
from .steps import HeadStep

DIM, BATCH = 512, 1024
_PACKAGE = str(Path(partialfc.__file__).parent)
_WARNING = "synchronizing CUDA operation"
_TOP = 15  # kernels that are listed


def run(bench: Bench, entries: Entries) -> None:
    classes = 20_000 if bench.small else 1_000_000
    decayed = partial(RowSGD, lr=0.1, unsampled_rows="decayed")
    settings: dict[str, dict[str, Any]] = {
        "rate 0.1": {"sample_rate": 0.1},
        "rate 1.0": {"sample_rate": 1.0},
        "rate 0.1, decayed rows": {"sample_rate": 0.1, "optimizer": decayed},
        "rate 0.1, two micro-batches": {"sample_rate": 0.1, "micro_batches": 2},
        "rate 0.1, center loss": {"sample_rate": 0.1, "center_loss": True},
        "rate 1.0, center loss": {"sample_rate": 1.0, "center_loss": True},
    }
    waits: dict[str, list[str]] = {}
    tops: dict[str, list[str]] = {}
    for name, setting in settings.items():
        center_loss = CenterLoss() if setting.pop("center_loss", False) else None
        make = partial(HeadStep, bench, classes, DIM, BATCH, center_loss=center_loss, **setting)
        entries.measure(name, partial(count, bench, name, make, waits, tops), need=5)
    for name, found in waits.items():
        entries[f"waits, {name}"] = found
    for name, kernels in tops.items():
        entries.details[f"kernels, {name}"] = kernels
        if "," not in name:
            entries[f"kernels of the most device time, {name}"] = kernels


def count(
    bench: Bench,
    name: str,
    make: partial[HeadStep],
    waits: dict[str, list[str]],
    tops: dict[str, list[str]],
) -> dict[str, Any]:
    """Return the totals of one step; add its waits by place and its slowest kernels to ``waits`` and ``tops``."""
    step = make()
    ms = bench.ms(step, repeats=5)
    with noted_waits() as places:
        step()
    bench.wait()
    waits[name] = [f"{count} at {place}" for place, count in places.most_common()]
    profile = Profile(step, bench)
    tops[name] = profile.top()
    return {
        "ms": ms,
        "waits warned of": sum(places.values()),
        "stream waits": profile.calls("cudaStreamSynchronize"),
        "event waits": profile.calls("cudaEventSynchronize"),
        "device waits": profile.calls("cudaDeviceSynchronize"),  # the profile itself adds one or two
        "kernels": profile.kernels,
        "copies": profile.copies,
        "device ms": profile.device_ms,
        "busy %": 100 * profile.device_ms / ms,
    }


@contextmanager
def noted_waits() -> Iterator[Counter[str]]:
    """Counts the waits that torch warns of, by the causing line of this package."""
    places: Counter[str] = Counter()

    def note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if _WARNING in str(message):
            places[_place(f"{filename}:{lineno}")] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _place(elsewhere: str) -> str:
    """Return the innermost line of this package being executed; ``elsewhere`` if there is none."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            return f"{frame.f_code.co_filename[len(_PACKAGE) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return elsewhere


class Profile:
    """Kernels that one step launches, and the device's time for it."""

    def __init__(self, step: HeadStep, bench: Bench) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            step()
            bench.wait()
        self._averages: Any = profiler.key_averages()
        # Named ranges, such as an optimizer's step, appear on the device too: they span kernels but are none.
        self._on_device = [
            event
            for event in self._averages
            if event.device_type == DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
            and not event.key.startswith("Optimizer.")
        ]
        copies = [event for event in self._on_device if event.key.startswith(("Memcpy", "Memset"))]
        self.copies = sum(event.count for event in copies)
        self.kernels = sum(event.count for event in self._on_device) - self.copies
        self.device_ms = sum(event.self_device_time_total for event in self._on_device) / 1e3

    def calls(self, name: str) -> int:
        """Count the calls of a function of the CUDA runtime."""
        return sum(event.count for event in self._averages if event.key == name)

    def top(self) -> list[str]:
        """Return the kernels and copies that take the most device time, with their share of it."""
        events = sorted(self._on_device, key=lambda event: event.self_device_time_total, reverse=True)[:_TOP]
        return [
            f"{event.self_device_time_total / 1e3:8.2f} ms "
            f"{event.self_device_time_total / 10 / max(self.device_ms, 1e-9):3.0f} % {event.count:5} × {event.key[:80]}"
            for event in events
        ]
