"""Which ranks are still there: every process signs in with the store every few seconds, from a thread of its own.

A rank that waits in a collective for another goes on signing in; one that is dead, stopped or cut off does not. So the
ranks that see a collective fail can name the one that is missing.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import torch.distributed as dist

_INTERVAL = 1.0  # seconds between signs of life
_SILENT_AFTER = 6.0


class Liveness:
    """Signs of life of all ranks of the default process group."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        # A store of its own: the default one may be blocked by a call that waits.
        default: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("partialfc-liveness", default.clone())
        self._closed = threading.Event()
        self._store.set(str(rank), "0")
        self._thread = threading.Thread(target=self._sign_in, name="liveness", daemon=True)
        self._thread.start()

    def _sign_in(self) -> None:
        count = 0
        while not self._closed.wait(_INTERVAL):
            count += 1
            try:
                self._store.set(str(self.rank), str(count))
            except RuntimeError:  # the store is gone, and with it whoever could read this
                return

    def silent_ranks(self) -> list[int]:
        """Ranks that have given no sign of life for some seconds; looks on for as long."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        try:
            seen = {rank: self._store.get(str(rank)) for rank in others if self._store.check([str(rank)])}
            silent = set(others)
            deadline = time.monotonic() + _SILENT_AFTER
            while silent and time.monotonic() < deadline:
                time.sleep(_INTERVAL / 4)
                silent -= {rank for rank in silent & seen.keys() if self._store.get(str(rank)) != seen[rank]}
        except RuntimeError:
            return [0] if self.rank else []  # the store lives with the first rank, or with its launcher
        return sorted(silent)

    def close(self) -> None:
        self._closed.set()
        self._thread.join(2 * _INTERVAL)
