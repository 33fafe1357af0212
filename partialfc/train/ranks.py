"""This process among the ranks of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from partialfc.train.liveness import Liveness

_START_TIMEOUT = timedelta(minutes=30)  # the first step waits for the slowest rank's imports, compilers and caches


@dataclass
class Rank:
    """Where this process stands."""

    rank: int
    world_size: int
    device: torch.device
    liveness: Liveness | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def set_timeout(self, seconds: float) -> None:
        """From now on a collective that takes longer than ``seconds`` fails."""
        if dist.is_initialized():
            # The only way torch offers to change the timeout of a group that exists.
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)


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
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_START_TIMEOUT)
    liveness = Liveness(dist.get_rank(), dist.get_world_size())
    try:
        yield Rank(dist.get_rank(), dist.get_world_size(), device, liveness)
        dist.barrier()  # rank 0 may still be writing: nobody tears the group down before it is done
    finally:
        liveness.close()
        dist.destroy_process_group()
