"""A store that only the processes of this start use.

A launcher that restarts failed workers may hand them the store of the previous start (torchrun does, since it shares
its own store with the workers: pytorch issue 135712). That store holds addresses of dead processes, to which nobody can
connect. Nothing in the environment distinguishes one start from the next on all nodes; the restart count is kept by
each node for itself. So the ranks find each other by name: each writes a random name, and rank 0 answers it. Nobody
reads an answer to the name of a dead process.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_LOOK_EVERY = 0.05  # seconds


def fresh_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return the launcher's store under a new prefix, the rank of this process, and the number of ranks.

    Raises:
        TimeoutError: another rank has not joined in time.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    deadline = time.monotonic() + timeout.total_seconds()
    name = _invite(store, world_size, deadline) if rank == 0 else _accept(store, rank, deadline)
    return dist.PrefixStore(f"partialfc-{name}", store), rank, world_size


def _invite(store: dist.Store, world_size: int, deadline: float) -> str:
    """Publish the name of this start until all ranks have confirmed it (rank 0)."""
    name = uuid.uuid4().hex
    missing = set(range(1, world_size))
    asked: dict[int, bytes] = {}
    while missing:
        for rank in sorted(missing):
            if store.check([f"asks-{rank}"]):
                asker = store.get(f"asks-{rank}")
                if asked.get(rank) != asker:  # the first one, or the successor of a dead process
                    asked[rank] = asker
                    store.set(f"invites-{asker.decode()}", name)
            if store.check([f"joins-{name}-{rank}"]):
                missing.discard(rank)
        _pause(deadline, f"rank {min(missing, default=0)} has not joined")
    store.set(f"begins-{name}", "")
    return name


def _accept(store: dist.Store, rank: int, deadline: float) -> str:
    """Ask for the name of this start, confirm it, and wait until all ranks have (ranks other than 0)."""
    me = uuid.uuid4().hex
    store.set(f"asks-{rank}", me)
    name = ""
    while not (name and store.check([f"begins-{name}"])):
        if store.check([f"invites-{me}"]):
            invited = store.get(f"invites-{me}").decode()
            if invited != name:  # the first one came from a rank 0 that was about to be ended
                name = invited
                store.set(f"joins-{name}-{rank}", "")
        _pause(deadline, "rank 0 has not answered" if not name else "another rank has not joined")
    return name


def _pause(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"the ranks have not found each other: {problem}")
    time.sleep(_LOOK_EVERY)
