"""Means over steps, for the lines of metrics.jsonl."""

from __future__ import annotations

from torch import Tensor

from partialfc.head import HeadOutput


class Means:
    """Sums of what steps report, kept on the device until they are read."""

    def __init__(self) -> None:
        self.steps = 0  # skipped ones included
        self._applied = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, out: HeadOutput, grad_norm: Tensor, skipped: bool) -> None:
        """Add one step. Of a skipped one only the samples count: its numbers are none."""
        self.steps += 1
        self._add("num_samples", out.num_samples)
        if skipped:
            return
        self._applied += 1
        self._add("loss", out.loss.detach())
        self._add("softmax_loss", out.softmax_loss)
        self._add("center_loss", out.center_loss)
        self._add("target_cosine", out.target_cosine)
        self._add("grad_norm", grad_norm)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.double()

    def read(self) -> dict[str, float]:
        """The mean of each over the steps, NaN if all were skipped; the sum of ``num_samples``."""
        names = ("loss", "softmax_loss", "center_loss", "target_cosine", "grad_norm")
        means = {name: float(self._sums[name]) / self._applied if self._applied else float("nan") for name in names}
        return means | {"num_samples": float(self._sums["num_samples"])}
