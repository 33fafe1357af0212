"""Steps, epochs and learning rates of a run."""

from __future__ import annotations

import math

from partialfc.config import Config
from partialfc.data.order import steps_per_epoch


def lr_factor(step: int, total_steps: int, warmup_steps: int, schedule: str, power: float = 2.0) -> float:
    """Return the factor on the peak learning rate at ``step`` (0-based): a linear rise from zero, then decay to zero.

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


class Schedule:
    """Length of a run in steps, and learning rate and samples of each step (0-based)."""

    def __init__(self, config: Config, num_samples: int) -> None:
        self._optim, self._num_samples = config.optim, num_samples
        self._batch_size = config.data.global_batch_size
        self.steps_per_epoch = steps_per_epoch(num_samples, self._batch_size)
        self.total_steps = max(1, round(config.optim.epochs * self.steps_per_epoch))
        self.warmup_steps = min(round(config.optim.warmup * self.steps_per_epoch), self.total_steps)

    def lr(self, step: int) -> float:
        """Return the backbone's learning rate in ``step``."""
        optim = self._optim
        return optim.lr * lr_factor(step, self.total_steps, self.warmup_steps, optim.schedule, optim.power)

    def batch_samples(self, step: int) -> int:
        """Return the samples in the global batch of ``step``; the last batch of an epoch may be short."""
        return min(self._batch_size, self._num_samples - step % self.steps_per_epoch * self._batch_size)
