"""Learning rates over steps."""

from __future__ import annotations

import math


def lr_factor(step: int, total_steps: int, warmup_steps: int, schedule: str, power: float = 2.0) -> float:
    """The factor on the peak learning rate at ``step`` (0-based): a linear rise from zero, then decay to zero.

    ``constant`` stays at 1; ``cosine`` and ``polynomial`` reach 0 at ``total_steps``.
    """
    if step < warmup_steps:
        return step / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "polynomial":
        return (1.0 - done) ** power
    raise ValueError(f"schedule must be constant, cosine or polynomial, got {schedule!r}")
