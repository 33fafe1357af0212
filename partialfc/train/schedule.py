"""Steps, epochs and learning rates of a run."""

from __future__ import annotations

import math

from partialfc.config import Config
from partialfc.data.order import BatchOrder


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
    """Length of a run in steps, and what follows from a step's number (0-based).

    Attributes:
        order: batches and epochs; set again when a run resumes with other batches than it began with.
    """

    def __init__(self, config: Config, order: BatchOrder) -> None:
        self._optim, self.order = config.optim, order

    @property
    def total_steps(self) -> int:
        """Number of the step with which the run ends."""
        return self.order.first_step + self._length

    def epoch(self, step: int) -> float:
        """Return the epochs that are done before ``step``."""
        return (step - self.order.first_step) / self.order.steps_per_epoch

    def lr(self, step: int) -> float:
        """Return the backbone's learning rate in ``step``."""
        optim = self._optim
        warmup_steps = min(round(optim.warmup * self.order.steps_per_epoch), self._length)
        done = step - self.order.first_step
        return optim.lr * lr_factor(done, self._length, warmup_steps, optim.schedule, optim.power)

    @property
    def _length(self) -> int:
        """Steps that ``optim.epochs`` take with the batches of today."""
        return max(1, round(self._optim.epochs * self.order.steps_per_epoch))
