"""The rank that keeps the others waiting step after step: a slow disk, a hot GPU, a neighbour on its host."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from partialfc.config import EngineConfig
from partialfc.runtime.process import ProcessContext

_COSTS = 0.1  # share of a step from which on a rank is called slow
_STEPS, _LINES = 10, 2  # at least, in a row: one pause of a rank is nothing


@dataclass(frozen=True)
class SlowestRank:
    """The rank with the most time of its own in the steps since the last line."""

    rank: int
    delay: float  # seconds a step, beyond the median of the other ranks

    @classmethod
    def among(cls, seconds: list[float]) -> SlowestRank:
        """Return the slowest by the seconds of each rank."""
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        others = seconds[:rank] + seconds[rank + 1 :]
        return cls(rank, seconds[rank] - median(others) if others else 0.0)


def exchange(active_rows: int, own_seconds: float, process: ProcessContext) -> tuple[int, list[float]]:
    """Return the sum of ``active_rows`` over the ranks, and the seconds of each, in one all-reduce. A collective."""
    values = torch.zeros(1 + process.world_size, dtype=torch.float64)
    values[0], values[1 + process.rank] = active_rows, own_seconds
    values = values.to(process.device)
    if process.world_size > 1:
        dist.all_reduce(values)
    rows, *seconds = values.tolist()
    return int(rows), seconds


class SlowRankRule:
    """Tells from train lines that the same rank has been slow in several of them in a row, once each time it begins."""

    def __init__(self) -> None:
        self._rank, self._since, self._lines, self._told = -1, 0, 0, False

    def is_slow(self, line: dict[str, Any]) -> bool:
        """Add a line; return True if its slowest rank is to be reported now."""
        costs = line["slowest_rank_delay"] / sum(line["seconds"].values())
        rank = line["slowest_rank"] if costs > _COSTS else -1
        if rank != self._rank:
            self._rank, self._since, self._lines, self._told = rank, line["step"], 0, False
        self._lines += 1
        due = rank >= 0 and not self._told and self._lines >= _LINES and line["step"] - self._since >= _STEPS
        self._told |= due
        return due


def own_phases(backbone: nn.Module, engine: EngineConfig) -> tuple[str, ...]:
    """Return the phases of a step in which a rank waits for no other one.

    Those who wait for a slow rank do so in the first collective that follows: the head's, if not the backbone's own.
    """
    gathers_weights = engine.name == "deepspeed" and engine.zero_stage == 3
    if gathers_weights or any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules()):
        return ("data",)
    return ("data", "forward", "update")
