"""Sample rates that change with the step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from partialfc.errors import ConfigError

SampleRate = float | Callable[[int], float]


class StepRate:
    """A rate that changes at certain steps: ``rates[i]`` from step ``starts[i]`` on.

    Args:
        rates: each in (0, 1].
        starts: steps at which the rates take effect, ascending from 0.

    ``StepRate([0.1, 0.3, 1.0], [0, 10_000, 18_000])`` ends with all classes, like LVFace (ICCV 2025).
    """

    def __init__(self, rates: Sequence[float], starts: Sequence[int]) -> None:
        check_rates(rates)
        rising = all(a < b for a, b in pairwise(starts))
        if len(rates) != len(starts) or not starts or starts[0] != 0 or not rising:
            raise ConfigError(
                f"each of the rates {list(rates)} needs a start; they begin at 0 and rise, got {list(starts)}"
            )
        self.rates, self.starts = tuple(rates), tuple(starts)

    def __call__(self, step: int) -> float:
        return self.rates[bisect_right(self.starts, step) - 1]

    @property
    def largest(self) -> float:
        """The largest rate of all steps."""
        return max(self.rates)

    def __repr__(self) -> str:
        return f"StepRate({list(self.rates)}, {list(self.starts)})"


class LinearRate:
    """A rate that changes linearly from ``start`` at step 0 to ``end`` at step ``steps``, then stays constant."""

    def __init__(self, start: float, end: float, steps: int) -> None:
        check_rates([start, end])
        if steps < 1:
            raise ConfigError(f"steps must be at least 1, got {steps}")
        self.start, self.end, self.steps = start, end, steps

    def __call__(self, step: int) -> float:
        done = min(1.0, step / self.steps)
        return self.start + (self.end - self.start) * done

    @property
    def largest(self) -> float:
        """The largest rate of all steps."""
        return max(self.start, self.end)

    def __repr__(self) -> str:
        return f"LinearRate({self.start:g}, {self.end:g}, {self.steps})"


class DelayedRate:
    """A rate that begins at ``first_step``, which may be negative, instead of at step 0."""

    def __init__(self, rate: Any, first_step: int) -> None:
        self.rate, self.first_step = rate, first_step

    def __call__(self, step: int) -> float:
        return self.rate(step - self.first_step)

    @property
    def largest(self) -> float:
        """The largest rate of all steps; missing where ``rate`` has none, as :func:`largest_rate` expects."""
        return float(self.rate.largest)

    def __repr__(self) -> str:
        return f"{self.rate!r} from step {self.first_step} on"


def check_rates(rates: Sequence[float]) -> None:
    """Raise ConfigError unless all ``rates`` lie in (0, 1]."""
    for rate in rates:
        if not 0.0 < rate <= 1.0:
            raise ConfigError(f"sample_rate must lie in (0, 1], got {rate}")


def rate_at(sample_rate: SampleRate, step: int) -> float:
    """Return the rate at ``step``; raise ConfigError unless it lies in (0, 1]."""
    rate = sample_rate(step) if callable(sample_rate) else sample_rate
    if not 0.0 < rate <= 1.0:
        raise ConfigError(f"sample_rate must lie in (0, 1], got {rate} at step {step}")
    return rate


def largest_rate(sample_rate: SampleRate, unknown: float = 1.0) -> float:
    """Return the largest rate of all steps; ``unknown`` for a function of the step without an attribute ``largest``."""
    if not callable(sample_rate):
        return float(sample_rate)
    return float(getattr(sample_rate, "largest", unknown))
