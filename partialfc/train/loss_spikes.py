"""Detection of spikes in the loss."""

from __future__ import annotations

from typing import Any


class SpikeRule:
    """Rule for loss spikes: a loss above ``factor`` times its running mean over about ``window`` steps.

    The first ``window`` losses are never spikes. Spikes do not enter the mean.
    """

    def __init__(self, factor: float, window: int) -> None:
        self.factor, self.window = factor, window
        self.mean, self.seen = 0.0, 0

    def is_spike(self, loss: float) -> bool:
        """Return True for a spike; include any other loss in the mean. A loss that is not finite is ignored."""
        if not abs(loss) < float("inf"):
            return False
        if self.seen >= self.window and loss > self.factor * self.mean:
            return True
        self.seen += 1
        self.mean += (loss - self.mean) / min(self.seen, self.window)
        return False

    def state(self) -> dict[str, Any]:
        """Return the values that a checkpoint keeps."""
        return {"mean": self.mean, "seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state`."""
        self.mean, self.seen = float(state["mean"]), int(state["seen"])
