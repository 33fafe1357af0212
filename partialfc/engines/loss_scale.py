"""Dynamic loss scaling, for float16."""

from __future__ import annotations

from typing import Any


class LossScale:
    """Factor on the loss that keeps small gradients from vanishing in float16 (Micikevicius et al., ICLR 2018).

    A step that overflows halves it, ``window`` consecutive steps that do not double it. The ranks agree on each step
    first, so their scales stay equal.
    """

    def __init__(self, initial: float = 2.0**16, window: int = 2000, least: float = 1.0, most: float = 2.0**24) -> None:
        self.value, self.window, self.least, self.most = initial, window, least, most
        self._good_steps = 0

    def applied(self) -> None:
        """Count a step that was applied."""
        self._good_steps += 1
        if self._good_steps >= self.window:
            self.value, self._good_steps = min(self.value * 2.0, self.most), 0

    def skipped(self) -> bool:
        """Halve the scale after a step that was skipped; return False if it is at its minimum already."""
        fell = self.value > self.least
        self.value, self._good_steps = max(self.value / 2.0, self.least), 0
        return fell

    def state(self) -> dict[str, Any]:
        """Return the values that a checkpoint keeps."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state`."""
        self.value, self._good_steps = float(state["value"]), int(state["good_steps"])
