"""This process among the ranks of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from partialfc.errors import PartialFCError, RankLost
from partialfc.train.liveness import Liveness

# What may take long on one rank while the others wait: imports, compilers and caches before the first step, the writing
# of a checkpoint, an evaluation.
PATIENCE = timedelta(minutes=60)


@dataclass
class Rank:
    """Where this process stands."""

    rank: int
    world_size: int
    device: torch.device
    liveness: Liveness | None
    timeout: timedelta = PATIENCE

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def set_timeout(self, seconds: float) -> None:
        """From now on a collective that takes longer than ``seconds`` fails."""
        self.timeout = timedelta(seconds=seconds)
        _set_group_timeout(self.timeout)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Within, collectives may take long: another rank writes or evaluates meanwhile."""
        _set_group_timeout(PATIENCE)
        yield
        _set_group_timeout(self.timeout)

    def enter(self, step: int, phase: str) -> None:
        """Say how far this rank is, for the others to know who keeps them waiting."""
        if self.liveness:
            self.liveness.enter(step, phase)

    def explain(self, error: Exception) -> Exception:
        """A failure in words that name the rank at fault, here or elsewhere; tells the other ranks of one here."""
        if self.liveness is None:
            return error
        if isinstance(error, RankLost) or (isinstance(error, RuntimeError) and not isinstance(error, PartialFCError)):
            reason = self.liveness.explain()
            return RankLost(f"{reason} (seen by rank {self.rank}: {error})") if reason else error
        self.liveness.report_failure(f"{error}" if isinstance(error, PartialFCError) else repr(error))
        return error


@contextmanager
def joined() -> Iterator[Rank]:
    """Join the process group that torchrun's environment describes; without one, a single process."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Rank(0, 1, device, None)
        return
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    rank = Rank(dist.get_rank(), dist.get_world_size(), device, Liveness(dist.get_rank(), dist.get_world_size()))
    try:
        yield rank
        dist.barrier()  # rank 0 may still be writing: nobody tears the group down before it is done
    finally:
        if rank.liveness:
            rank.liveness.close()
        dist.destroy_process_group()


def _set_group_timeout(timeout: timedelta) -> None:
    if dist.is_initialized():
        # The only way torch offers to change the timeout of a group that exists.
        dist.distributed_c10d._set_pg_timeout(timeout, dist.group.WORLD)
