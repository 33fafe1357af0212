"""Which rank keeps the others waiting, and why.

Every process signs in with the store every second, from a thread of its own, and says how far its main thread has
come. When a collective fails, the ranks that see it look there: one that signs in no more is dead, stopped or cut off;
one that has fallen behind hangs. A rank that fails by itself leaves its reason.

Where collectives may take long (evaluations, checkpoints) nobody would see that for an hour. So a second thread judges:
the first rank watches all others, they watch the first and whether the store still answers. A process that waits for
a lost rank is ended, with the reason. Silence is counted in wake-ups of the judge, not in seconds: a machine that was
suspended as a whole has lost nobody.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from partialfc.runtime.stopping import StopRequest

_INTERVAL = 1.0  # seconds between signs of life
_SILENT_AFTER = 6.0  # seconds, when somebody looks on because a collective has failed
_LOOKS_FOR = 20.0  # seconds that looking may take: the store may not answer
_GRACE = 15  # wake-ups for a main thread to notice a failure by itself
_PHASES = ("data", "forward", "head", "backward", "update", "save", "evaluate")

_UNREACHABLE = "the store that all ranks share does not answer: rank 0, its launcher or the network to it is gone"


class Liveness:
    """Signs of life of all ranks of the default process group. A collective.

    Args:
        timeout: seconds of silence after which a rank is lost.
        stop: passed on between the ranks: what one of them is asked to do, all do.
        on_lost: called, by a thread, with the reason why waiting has become pointless; it should end the process.
    """

    def __init__(
        self, rank: int, world_size: int, timeout: float, stop: StopRequest, on_lost: Callable[[str], None]
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._patience = max(_GRACE, round(timeout / _INTERVAL))
        self._stop, self._on_lost = stop, on_lost
        # A connection of its own: the default one may be blocked by a call that waits.
        default: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("liveness", default.clone())
        self._watched = [other for other in (range(world_size) if rank == 0 else [0]) if other != rank]
        self._position = (0, 0)  # step, phase that this rank is in
        self._closed = threading.Event()
        self._ending = False  # the main thread has seen for itself that something is wrong
        self._failure: str | None = None
        self._signs: dict[int, str] = {}  # of the watched ranks
        self._rounds = 0  # of the first thread
        self._store.set(self._key(rank), self._sign(0))
        dist.barrier()
        self._threads = [
            threading.Thread(target=work, name="liveness", daemon=True) for work in (self._sign_in, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def enter(self, step: int, phase: str) -> None:
        """Say that this rank now begins ``phase`` of ``step``."""
        self._position = (step, _PHASES.index(phase))

    def report_failure(self, reason: str) -> None:
        """Leave the reason why this rank ends; the first one to do so is believed."""
        self._ending = True
        _within(_LOOKS_FOR / 4, lambda: self._leave(f"rank {self.rank}: {reason}"))

    def explain(self) -> str | None:
        """Why the others keep this rank waiting, as far as can be told; looks on for some seconds."""
        self._ending = True
        answered, reason = _within(_LOOKS_FOR, self._look_on)
        return reason if answered else _UNREACHABLE

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(2 * _INTERVAL)

    # --- signing in: all that talks to the store, which may block -----------------------------------------------------

    def _sign_in(self) -> None:
        count, told = 0, False
        try:
            while not self._closed.wait(_INTERVAL):
                count += 1
                self._store.set(self._key(self.rank), self._sign(count))
                if self._store.check(["stop"]):
                    self._stop.request(self._store.get("stop").decode())
                elif self._stop.requested and not told:
                    told = True
                    self._store.set("stop", f"{self._stop.reason} (rank {self.rank})")
                if self._store.check(["failure"]):
                    self._failure = self._store.get("failure").decode()
                self._signs = self._read(self._watched)
                self._rounds += 1
        except RuntimeError:  # the store is gone, and with it whoever could read this
            return

    # --- judging ------------------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        silence = dict.fromkeys(self._watched, 0)
        unanswered = failed = 0
        signs, rounds = self._signs, self._rounds
        while not self._closed.wait(_INTERVAL):
            unanswered = unanswered + 1 if rounds == self._rounds else 0
            if not unanswered:
                silence = {
                    rank: silence[rank] + 1 if self._signs.get(rank) == signs.get(rank) else 0 for rank in silence
                }
                signs, rounds = self._signs, self._rounds
            failed += self._failure is not None
            lost = {rank for rank, wakes in silence.items() if wakes >= self._patience}
            reason = None
            if lost:
                reason = _silent(lost)
            elif unanswered >= self._patience:
                reason = _UNREACHABLE
            elif failed >= _GRACE:
                reason = self._failure
            if reason and not self._ending:
                if lost:
                    with contextlib.suppress(RuntimeError):
                        self._leave(reason)
                self._on_lost(reason)
                return

    # --- looking on, once a collective has failed ---------------------------------------------------------------------

    def _look_on(self) -> str | None:
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        first = self._read(others)
        silent = set(others)
        deadline = time.monotonic() + _SILENT_AFTER
        while silent and time.monotonic() < deadline:
            if self._store.check(["failure"]):
                return self._store.get("failure").decode()
            now = self._read(sorted(silent))
            silent -= {rank for rank in silent if now[rank] != first[rank]}
            time.sleep(_INTERVAL / 4)
        if silent:
            self._leave(_silent(silent))
            return _silent(silent)
        behind = {rank: _position(sign) for rank, sign in self._read(others).items()}
        slowest = min(behind.values(), default=self._position)
        if slowest < self._position:
            ranks = {rank for rank, position in behind.items() if position == slowest}
            return f"rank {_list(ranks)} hangs: still in {_PHASES[slowest[1]]} of step {slowest[0] + 1}"
        return None

    # --- the store ----------------------------------------------------------------------------------------------------

    def _leave(self, reason: str) -> None:
        self._store.compare_set("failure", "", reason)

    def _sign(self, count: int) -> str:
        return f"{count} {self._position[0]} {self._position[1]}"

    def _read(self, ranks: list[int]) -> dict[int, str]:
        """Signs of life: a count, the step, the phase."""
        signs = self._store.multi_get([self._key(rank) for rank in ranks]) if ranks else []
        return {rank: sign.decode() for rank, sign in zip(ranks, signs, strict=True)}

    def _key(self, rank: int) -> str:
        return f"rank-{rank}"


def _position(sign: str) -> tuple[int, int]:
    _, step, phase = map(int, sign.split())
    return step, phase


def _silent(ranks: set[int]) -> str:
    return (
        f"not heard from rank {_list(ranks)}: it has died, is stopped or cannot be reached; look at the end of its log"
    )


def _list(ranks: set[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _within(seconds: float, work: Callable[[], str | None]) -> tuple[bool, str | None]:
    """Whether ``work`` has ended in time, and what it gave; a store that is gone counts as one that does not answer."""
    results: list[str | None] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            results.append(work())

    thread = threading.Thread(target=run, name="liveness-look", daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(results), results[0] if results else None
