"""Dynamic loss scaling, for float16."""

from __future__ import annotations

from typing import Any


class LossScale:
    """The factor on the loss that keeps small gradients from vanishing in float16 (Micikevicius et al., ICLR 2018).

    It is halved with each step that overflows, and doubled after ``window`` steps in a row that do not. The ranks agree
    on each step before, so theirs stay equal.
    """

    def __init__(self, initial: float = 2.0**16, window: int = 2000, least: float = 1.0, most: float = 2.0**24) -> None:
        self.value, self.window, self.least, self.most = initial, window, least, most
        self._good_steps = 0

    def applied(self) -> None:
        """A step was applied."""
        self._good_steps += 1
        if self._good_steps >= self.window:
            self.value, self._good_steps = min(self.value * 2.0, self.most), 0

    def skipped(self) -> bool:
        """A step was skipped; whether the scale could still fall."""
        fell = self.value > self.least
        self.value, self._good_steps = max(self.value / 2.0, self.least), 0
        return fell

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load(self, state: dict[str, Any]) -> None:
        self.value, self._good_steps = float(state["value"]), int(state["good_steps"])
