"""The rule that takes a run back to its last checkpoint when the loss jumps."""

from __future__ import annotations

from typing import Any


class SpikeRule:
    """A loss that exceeds ``factor`` times its running mean, taken over about ``window`` steps, is a spike.

    Nothing is one before ``window`` steps were seen. Spikes do not enter the mean.
    """

    def __init__(self, factor: float, window: int) -> None:
        self.factor, self.window = factor, window
        self.mean, self.seen = 0.0, 0

    def is_spike(self, loss: float) -> bool:
        """Judge the loss of one step, and remember it if it is none; one that is not finite is never one."""
        if not abs(loss) < float("inf"):
            return False
        if self.seen >= self.window and loss > self.factor * self.mean:
            return True
        self.seen += 1
        self.mean += (loss - self.mean) / min(self.seen, self.window)
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"mean": self.mean, "seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        self.mean, self.seen = float(state["mean"]), int(state["seen"])
