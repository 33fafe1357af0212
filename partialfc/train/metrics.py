"""The train lines of metrics.jsonl."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from partialfc.head import HeadOutput
from partialfc.runtime.process import ProcessContext
from partialfc.train.phase_clock import PhaseClock
from partialfc.train.schedule import Schedule
from partialfc.train.slow_rank import SlowestRank, exchange

_MEANS = ("loss", "softmax_loss", "center_loss", "target_cosine", "grad_norm")


class TrainMetrics:
    """Collects the results of steps, on the device, and forms train lines from them.

    Args:
        own_phases: those of a step in which a rank waits for no other one.

    Attributes:
        samples: seen by the run, up to the last line.
    """

    def __init__(
        self, process: ProcessContext, schedule: Schedule, clock: PhaseClock, own_phases: tuple[str, ...]
    ) -> None:
        self._process, self._schedule, self._clock = process, schedule, clock
        self._own_phases = own_phases
        self.samples = 0
        self._reset()

    def _reset(self) -> None:
        self._steps = self._applied_steps = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, out: HeadOutput, grad_norm: Tensor, skipped: bool) -> None:
        """Add one step. Only the samples of a skipped step count: its other numbers are meaningless."""
        self._steps += 1
        self._add("num_samples", out.num_samples)
        if skipped:
            return
        self._applied_steps += 1
        self._add("loss", out.loss.detach())
        self._add("softmax_loss", out.softmax_loss)
        self._add("center_loss", out.center_loss)
        self._add("target_cosine", out.target_cosine)
        self._add("grad_norm", grad_norm)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.double()

    def line(self, step: int, active_rows: int, skipped_steps: int) -> dict[str, Any]:
        """Return a train line, equal on all ranks, and begin the next one. A collective.

        Losses, cosine and norm are means over the applied steps since the last line, NaN if all were skipped.

        Args:
            step: number of steps done.
            active_rows: rows of this rank's shard that took part in the last step.
            skipped_steps: of the run so far.
        """
        steps, applied = self._steps, self._applied_steps
        means = {name: float(self._sums[name]) / applied if applied else float("nan") for name in _MEANS}
        samples = int(self._sums["num_samples"])
        self._reset()
        seconds = {phase: total / steps for phase, total in self._clock.read().items()}
        own_seconds = sum(seconds.get(phase, 0.0) for phase in self._own_phases)
        active, of_ranks = exchange(active_rows, own_seconds, self._process)
        slowest = SlowestRank.among(of_ranks)
        self._clock.start()
        self.samples += samples
        return {
            "step": step,
            "epoch": round(self._schedule.epoch(step), 4),
            "samples": self.samples,
            **means,
            "active_rows": active,
            "lr": self._schedule.lr(step - 1),
            "skipped_steps": skipped_steps,
            "samples_per_s": samples / (steps * sum(seconds.values())),
            "seconds": seconds,
            "slowest_rank": slowest.rank,
            "slowest_rank_delay": slowest.delay,
        }
