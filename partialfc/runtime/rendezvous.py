"""A store that only the processes of this start use.

A launcher that starts failed workers again may hand them the store of the time before (torchrun has done so since it
shares its own with the workers: pytorch issue 135712). Addresses of dead processes lie in it, and whoever reads them
cannot connect. Neither a restart count, which every node keeps for itself, nor anything else in the environment tells
one start from the next on all nodes. So the ranks find each other by name: each leaves a name made up at random, and
the first rank answers to names. A name left by a dead process gets an answer that nobody reads.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_LOOK_EVERY = 0.05  # seconds


def fresh_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The launcher's store under a prefix that is new, this process's rank, and the number of ranks.

    Raises:
        TimeoutError: another rank has not come.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    deadline = time.monotonic() + timeout.total_seconds()
    name = _invite(store, world_size, deadline) if rank == 0 else _be_invited(store, rank, deadline)
    return dist.PrefixStore(f"partialfc-{name}", store), rank, world_size


def _invite(store: dist.Store, world_size: int, deadline: float) -> str:
    """As the first rank: give the name of this start to all that ask for it, until each has confirmed it."""
    name = uuid.uuid4().hex
    missing = set(range(1, world_size))
    asked: dict[int, bytes] = {}
    while missing:
        for rank in sorted(missing):
            if store.check([f"asks-{rank}"]):
                asker = store.get(f"asks-{rank}")
                if asked.get(rank) != asker:  # the first, or one that has come after a dead one
                    asked[rank] = asker
                    store.set(f"invites-{asker.decode()}", name)
            if store.check([f"joins-{name}-{rank}"]):
                missing.discard(rank)
        _pause(deadline, f"rank {min(missing, default=0)} has not come")
    store.set(f"begins-{name}", "")
    return name


def _be_invited(store: dist.Store, rank: int, deadline: float) -> str:
    """As any other rank: ask for the name of this start, confirm it, and wait until all have."""
    me = uuid.uuid4().hex
    store.set(f"asks-{rank}", me)
    name = ""
    while not (name and store.check([f"begins-{name}"])):
        if store.check([f"invites-{me}"]):
            invited = store.get(f"invites-{me}").decode()
            if invited != name:  # a second invitation: the first was from a process that was about to be ended
                name = invited
                store.set(f"joins-{name}-{rank}", "")
        _pause(deadline, "rank 0 has not answered" if not name else "another rank has not come")
    return name


def _pause(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"the ranks have not found each other: {problem}")
    time.sleep(_LOOK_EVERY)
