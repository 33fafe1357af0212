"""Which rank keeps the others waiting, and why.

Every process signs in with the store every second, from a thread of its own, and says how far its main thread has
come. When a collective fails, the ranks that see it look there: one that signs in no more is dead, stopped or cut off;
one that has fallen behind hangs. A rank that fails by itself leaves its reason.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import torch.distributed as dist

_INTERVAL = 1.0  # seconds between signs of life
_SILENT_AFTER = 6.0
_PHASES = ("data", "forward", "head", "backward", "update", "save", "evaluate")


class Liveness:
    """Signs of life of all ranks of the default process group."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        # A connection of its own: the default one may be blocked by a call that waits.
        default: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("partialfc-liveness", default.clone())
        self._position = (0, 0)  # step, phase that this rank is in
        self._closed = threading.Event()
        self._store.set(self._key(rank), self._sign(0))
        self._thread = threading.Thread(target=self._sign_in, name="liveness", daemon=True)
        self._thread.start()

    def enter(self, step: int, phase: str) -> None:
        """Say that this rank now begins ``phase`` of ``step``."""
        self._position = (step, _PHASES.index(phase))

    def report_failure(self, reason: str) -> None:
        """Leave the reason why this rank ends; the first one to do so is believed."""
        with contextlib.suppress(RuntimeError):  # the store is gone: nobody could read it
            self._store.compare_set("failure", "", f"rank {self.rank}: {reason}")

    def explain(self) -> str | None:
        """Why the others keep this rank waiting, as far as can be told; looks on for some seconds."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        try:
            first = {rank: self._read(rank) for rank in others}
            silent = set(others)
            deadline = time.monotonic() + _SILENT_AFTER
            while silent and time.monotonic() < deadline:
                if self._store.check(["failure"]):
                    return self._store.get("failure").decode()
                silent -= {rank for rank in silent if self._read(rank)[0] != first[rank][0]}
                time.sleep(_INTERVAL / 4)
            if silent:
                return (
                    f"not heard from rank {_list(silent)}: it has died, is stopped or cannot be reached; "
                    "look at the end of its log"
                )
            behind = {rank: self._read(rank)[1] for rank in others}
            slowest = min(behind.values(), default=self._position)
            if slowest < self._position:
                ranks = {rank for rank, position in behind.items() if position == slowest}
                return f"rank {_list(ranks)} hangs: still in {_PHASES[slowest[1]]} of step {slowest[0] + 1}"
        except RuntimeError:
            return "the store that all ranks share is gone, and with it rank 0 or its launcher" if self.rank else None
        return None

    def close(self) -> None:
        self._closed.set()
        self._thread.join(2 * _INTERVAL)

    def _sign_in(self) -> None:
        count = 0
        while not self._closed.wait(_INTERVAL):
            count += 1
            try:
                self._store.set(self._key(self.rank), self._sign(count))
            except RuntimeError:  # the store is gone, and with it whoever could read this
                return

    def _sign(self, count: int) -> str:
        return f"{count} {self._position[0]} {self._position[1]}"

    def _read(self, rank: int) -> tuple[int, tuple[int, int]]:
        """A rank's last sign of life and its position; (-1, …) for one that never gave any."""
        if not self._store.check([self._key(rank)]):
            return -1, (0, 0)
        count, step, phase = map(int, self._store.get(self._key(rank)).split())
        return count, (step, phase)

    def _key(self, rank: int) -> str:
        return f"rank-{rank}"


def _list(ranks: set[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
