"""Signs of life of all ranks, which identify a rank that keeps the others waiting, and the reason.

A thread of every process writes a sign of life to the store each second, with the step and phase of the main thread.
When a collective fails, the other ranks read these: a rank without new signs is dead, stopped or cut off; a rank that
has fallen behind hangs. A rank that fails on its own leaves its reason in the store.

During evaluations and checkpoints, when collectives may take long, a lost rank would go unnoticed for an hour; and on
GPUs a collective never fails, but leaves the main thread waiting. So a second thread watches: rank 0 watches all ranks,
the others watch rank 0, and all watch the store. It ends a process that waits for a lost rank, or among ranks none of
which gets any further, with the reason. It counts silence in its own wake-ups, not in seconds: after a suspension of
the whole machine no rank is lost.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from partialfc.runtime.stopping import StopCause, StopRequest
from partialfc.runtime.timings import DEFAULT_TIMINGS, Timings

_PHASES = ("data", "forward", "head", "backward", "update", "save", "evaluate")

_UNREACHABLE = "the store that all ranks share does not answer: rank 0, its launcher or the network to it is gone"

_STANDSTILL = "no rank gets any further, and all are at the same place: is the network between them broken?"


class Liveness:
    """Signs of life of all ranks of the default process group. A collective.

    Args:
        timeout: seconds of silence after which a rank counts as lost.
        stop: the request of this process; a request on one rank reaches all of them.
        on_lost: called by a thread with the reason when a rank is lost; it should end the process.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: float,
        stop: StopRequest,
        on_lost: Callable[[str], None],
        timings: Timings = DEFAULT_TIMINGS,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._timings = timings
        self._most_silent = max(timings.grace_signs, round(timeout / timings.sign_every))
        self._stop, self._on_lost = stop, on_lost
        # A separate connection: a waiting call may block the default one.
        default: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("liveness", default.clone())
        self._watched = [other for other in (range(world_size) if rank == 0 else [0]) if other != rank]
        self._position = (0, 0)  # step and phase of this rank
        self._progress_expected = False
        self._closed = threading.Event()
        self._ending = False  # the main thread has noticed a failure on its own
        self._failure: str | None = None
        self._signs: dict[int, str] = {}  # by watched rank
        self._rounds = 0  # of signing in
        self._store.set(self._key(rank), self._sign(0))
        dist.barrier()
        self._threads = [
            threading.Thread(target=work, name="liveness", daemon=True) for work in (self._sign_in, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def enter(self, step: int, phase: str) -> None:
        """Record that this rank begins ``phase`` of ``step``."""
        self._position = (step, _PHASES.index(phase))

    def expect_progress(self, expected: bool) -> None:
        """Say if some rank should enter a phase within ``timeout``: not before the first step, nor while one saves."""
        self._progress_expected = expected

    def report_failure(self, reason: str) -> None:
        """Publish the reason for which this rank ends; the first reason of all ranks counts."""
        self._ending = True
        _within(self._timings.explain_within / 4, lambda: self._publish(f"rank {self.rank}: {reason}"))

    def explain(self) -> str | None:
        """Return the reason another rank keeps this one waiting, or None; watches the signs for some seconds."""
        self._ending = True
        answered, reason = _within(self._timings.explain_within, self._find_reason)
        return reason if answered else _UNREACHABLE

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(2 * self._timings.sign_every)

    # --- signing in: everything that talks to the store, which may block ----------------------------------------------

    def _sign_in(self) -> None:
        count, shared = 0, False
        try:
            while not self._closed.wait(self._timings.sign_every):
                count += 1
                self._store.set(self._key(self.rank), self._sign(count))
                if self._store.check(["stop"]):
                    self._stop.request(StopCause.from_text(self._store.get("stop").decode()))
                elif self._stop.requested and not shared:
                    shared = True
                    assert self._stop.cause
                    cause = replace(self._stop.cause, reason=f"{self._stop.cause.reason} (rank {self.rank})")
                    self._store.set("stop", cause.to_text())
                if self._store.check(["failure"]):
                    self._failure = self._store.get("failure").decode()
                self._signs = self._read(self._watched)
                self._rounds += 1
        except RuntimeError:  # the store is gone, and its readers with it
            return

    # --- watching -----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        silence = dict.fromkeys(self._watched, 0)
        unanswered = failed = standstill = 0
        signs, rounds = self._signs, self._rounds
        positions: dict[int, tuple[int, int]] = {}
        while not self._closed.wait(self._timings.sign_every):
            unanswered = unanswered + 1 if rounds == self._rounds else 0
            if not unanswered:
                silence = {
                    rank: silence[rank] + 1 if self._signs.get(rank) == signs.get(rank) else 0 for rank in silence
                }
                signs, rounds = self._signs, self._rounds
            failed += self._failure is not None
            last, positions = positions, self._positions(self._signs)
            standstill = standstill + 1 if self._progress_expected and positions == last else 0
            lost = {rank for rank, wakes in silence.items() if wakes >= self._most_silent}
            reason = None
            if lost:
                reason = self._failure or _not_heard_from(lost)
            elif unanswered >= self._most_silent:
                reason = _UNREACHABLE
            elif failed >= self._timings.grace_signs:
                reason = self._failure
            elif self.rank == 0 and standstill >= self._most_silent + self._timings.grace_signs:
                reason = _hanging(positions) or _STANDSTILL
            if reason and not self._ending:
                if reason != self._failure:
                    with contextlib.suppress(RuntimeError):
                        self._publish(reason)
                self._on_lost(reason)
                return

    # --- explaining a failed collective -------------------------------------------------------------------------------

    def _find_reason(self) -> str | None:
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        first = self._read(others)
        silent = set(others)
        deadline = time.monotonic() + self._timings.silent_after
        while silent and time.monotonic() < deadline:
            if self._store.check(["failure"]):
                return self._store.get("failure").decode()
            now = self._read(sorted(silent))
            silent -= {rank for rank in silent if now[rank] != first[rank]}
            time.sleep(self._timings.sign_every / 4)
        if silent:
            self._publish(_not_heard_from(silent))
            return _not_heard_from(silent)
        return _hanging(self._positions(self._read(others)))

    def _positions(self, signs: dict[int, str]) -> dict[int, tuple[int, int]]:
        """Return step and phase of this rank and of those that have given these signs."""
        return {self.rank: self._position} | {rank: _position(sign) for rank, sign in signs.items()}

    # --- the store ----------------------------------------------------------------------------------------------------

    def _publish(self, reason: str) -> None:
        self._store.compare_set("failure", "", reason)

    def _sign(self, count: int) -> str:
        return f"{count} {self._position[0]} {self._position[1]}"

    def _read(self, ranks: list[int]) -> dict[int, str]:
        """Return the signs of these ranks: count, step and phase."""
        signs = self._store.multi_get([self._key(rank) for rank in ranks]) if ranks else []
        return {rank: sign.decode() for rank, sign in zip(ranks, signs, strict=True)}

    def _key(self, rank: int) -> str:
        return f"rank-{rank}"


def _position(sign: str) -> tuple[int, int]:
    _, step, phase = map(int, sign.split())
    return step, phase


def _not_heard_from(ranks: set[int]) -> str:
    return (
        f"not heard from rank {_list(ranks)}: it has died, is stopped or cannot be reached; look at the end of its log"
    )


def _hanging(positions: dict[int, tuple[int, int]]) -> str | None:
    """Name the ranks that the others wait for: those that have fallen behind; None if all are at the same place."""
    slowest = min(positions.values())
    ranks = {rank for rank, position in positions.items() if position == slowest}
    if len(ranks) == len(positions):
        return None
    return f"rank {_list(ranks)} hangs: still in {_PHASES[slowest[1]]} of step {slowest[0] + 1:,}"


def _list(ranks: set[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _within(seconds: float, work: Callable[[], str | None]) -> tuple[bool, str | None]:
    """Run ``work`` in a thread; return True and its result, or False if it took too long or the store is gone."""
    results: list[str | None] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            results.append(work())

    thread = threading.Thread(target=run, name="liveness-look", daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(results), results[0] if results else None
