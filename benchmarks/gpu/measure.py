"""Tools of every section: a device, a deadline, timers, and entries that fail one by one."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

GIB = 2**30
_LONG_WARM_UP = 2.0  # seconds: a longer first run is warm-up enough

Mark = torch.cuda.Event | float


class PhasedStep(Protocol):
    """A training step in three parts."""

    def forward(self) -> None: ...

    def backward(self) -> None: ...

    def update(self) -> None: ...


@dataclass
class Bench:
    """The device, the choice of sizes, and the time left to the current section."""

    device: torch.device
    small: bool
    out: Path  # the folder for results
    deadline: float = float("inf")  # of time.monotonic()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Return the seconds left to the section."""
        return self.deadline - time.monotonic()

    def lacks(self, seconds: float) -> bool:
        """Return True if less time than this is left; small sizes take a small part of it."""
        return self.left() < seconds * (0.03 if self.small else 1.0)

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def unit(self, *shape: int) -> Tensor:
        """Return random vectors of length 1, float32."""
        return torch.nn.functional.normalize(self.randn(*shape), dim=-1)

    def times(self, step: Callable[[], Any], repeats: int = 7, seconds: float = 3.0) -> list[float]:
        """Return milliseconds of each run of ``step``: ``repeats`` of them after a warm-up, or as many as ``seconds``
        hold, at least two.
        """
        marks = []
        for _ in range(self._affordable(step, repeats, seconds)):
            marks.append(self._mark())
            step()
        marks.append(self._mark())
        self.wait()
        return [_milliseconds(first, last) for first, last in pairwise(marks)]

    def ms(self, step: Callable[[], Any], repeats: int = 7, seconds: float = 3.0) -> float:
        """Return the median milliseconds of ``step``; see :meth:`times`."""
        return statistics.median(self.times(step, repeats, seconds))

    def phases(self, step: PhasedStep, repeats: int = 7, seconds: float = 3.0) -> dict[str, float]:
        """Return median milliseconds of a step and of its parts, and the spread of its runs in percent."""
        parts = {"forward": step.forward, "backward": step.backward, "update": step.update}
        found: dict[str, list[float]] = {"ms": [], **{name: [] for name in parts}}

        def whole() -> None:
            for part in parts.values():
                part()

        runs = []
        for _ in range(self._affordable(whole, repeats, seconds)):
            marks = [self._mark()]
            for part in parts.values():
                part()
                marks.append(self._mark())
            runs.append(marks)
        self.wait()
        for marks in runs:
            found["ms"].append(_milliseconds(marks[0], marks[-1]))
            for name, (first, last) in zip(parts, pairwise(marks), strict=True):
                found[name].append(_milliseconds(first, last))
        medians = {name: statistics.median(values) for name, values in found.items()}
        return {**medians, "spread %": 100 * (max(found["ms"]) - min(found["ms"])) / medians["ms"]}

    def _affordable(self, step: Callable[[], Any], repeats: int, seconds: float) -> int:
        """Warm up, and return the number of runs to time."""
        took = float("inf")
        for _ in range(2):
            started = time.perf_counter()
            step()
            self.wait()
            took = time.perf_counter() - started
            if took > _LONG_WARM_UP:
                break
        return max(2, min(repeats, int(seconds / max(took, 1e-6))))

    def _mark(self) -> Mark:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reset_peak(self) -> None:
        """Forget the peak of allocated memory."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """Return the peak GiB of device memory allocated since :meth:`reset_peak`; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / GIB if self.cuda else None

    def free(self) -> None:
        """Release unreferenced memory."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def _milliseconds(first: Mark, last: Mark) -> float:
    if isinstance(first, float) or isinstance(last, float):
        assert isinstance(first, float)
        assert isinstance(last, float)
        return 1e3 * (last - first)
    return first.elapsed_time(last)


class Entries(dict[str, Any]):
    """Findings of a section, by name. A failed measurement becomes an entry with the reason.

    ``problems`` are findings that make the whole run fail; ``details`` go to the JSON file, but not to the table.
    """

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench
        self.problems: list[str] = []
        self.details: dict[str, Any] = {}

    def measure(self, name: str, function: Callable[[], Any], need: float = 1.0) -> Any:
        """Record and return the result of ``function``, unless fewer than ``need`` seconds are left; else None."""
        if self.bench.lacks(need):
            self[name] = {"skipped": f"needs {need:.0f} s, {max(self.bench.left(), 0):.0f} s are left"}
            return None
        try:
            self[name] = function()
        except torch.OutOfMemoryError:
            self[name] = {"out of memory": True}
        except NotImplementedError as error:
            self[name] = {"unavailable": first_line(error)}
        except Exception as error:
            self[name] = {"error": first_line(error)}
            self.problems.append(f"{name}: {first_line(error)}")
        else:
            return self[name]
        finally:
            self.bench.free()
        return None


def first_line(error: Exception) -> str:
    """Return the kind of ``error`` and the beginning of its message."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
