"""This process among the ranks of a run."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from partialfc.errors import CheckpointFailed, PartialFCError, RankLost
from partialfc.runtime.agreement import require_same_over, software
from partialfc.runtime.collectives import all_gather_object
from partialfc.runtime.liveness import Liveness
from partialfc.runtime.rendezvous import fresh_store
from partialfc.runtime.stopping import StopCause, StopRequest
from partialfc.runtime.timings import DEFAULT_TIMINGS, Timings
from partialfc.tracking.console import printable

#: Timeout of collectives during which one rank may work for long while the others wait: imports, compilers and caches
#: before the first step, the writing of a checkpoint, an evaluation.
LONG_TIMEOUT = timedelta(minutes=60)
_NCCL_GRACE = timedelta(seconds=60)


@dataclass
class ProcessContext:
    """Rank, device and stop request of this process, and its contact with the other ranks."""

    rank: int
    world_size: int
    device: torch.device
    stop: StopRequest
    liveness: Liveness | None = None
    timeout: timedelta = LONG_TIMEOUT
    hosts: list[str] = field(default_factory=lambda: [socket.gethostname()])  # by rank
    timings: Timings = DEFAULT_TIMINGS
    #: Called by the main thread, now and then, while it works outside the training steps.
    on_progress: list[Callable[[], None]] = field(default_factory=list)
    #: Called by a thread, with the reason, when another rank is lost; the process ends right after.
    on_lost: list[Callable[[str], None]] = field(default_factory=list)
    _groups: list[dist.ProcessGroup] = field(default_factory=list)  # besides the group of all ranks
    _explained: Exception | None = None

    @property
    def is_first(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def set_timeout(self, seconds: float) -> None:
        """Make collectives fail from now on if they take longer than ``seconds``."""
        self.timeout = timedelta(seconds=seconds)
        self._set_group_timeouts(self.timeout)
        self._expect_progress(True)

    def watch(self, group: dist.ProcessGroup) -> None:
        """Apply the timeout to the collectives of one more group."""
        self._groups.append(group)
        self._set_group_timeouts(self.timeout)

    @contextmanager
    def relaxed_timeout(self) -> Iterator[None]:
        """Give collectives :data:`LONG_TIMEOUT` inside the context: another rank writes or evaluates meanwhile."""
        self._set_group_timeouts(LONG_TIMEOUT)
        self._expect_progress(False)
        try:
            yield
        finally:
            self._set_group_timeouts(self.timeout)
            self._expect_progress(self.timeout != LONG_TIMEOUT)

    def _expect_progress(self, expected: bool) -> None:
        if self.liveness:
            self.liveness.expect_progress(expected)

    def _set_group_timeouts(self, timeout: timedelta) -> None:
        if dist.is_initialized():
            for group in (dist.group.WORLD, *self._groups):
                # torch has no public way to change the timeout of an existing group.
                dist.distributed_c10d._set_pg_timeout(timeout + self._grace, group)

    @property
    def _grace(self) -> timedelta:
        """Time for the watch to name the rank at fault: NCCL's own watchdog ends the process without a reason."""
        return _NCCL_GRACE if self.device.type == "cuda" else timedelta(0)

    def enter(self, step: int, phase: str) -> None:
        """Publish the position of this rank, from which the others identify a rank that keeps them waiting."""
        if self.liveness:
            self.liveness.enter(step, phase)

    def report_progress(self) -> None:
        """Report that this rank is working outside training steps."""
        for listener in self.on_progress:
            listener()

    def agree_to_stop(self) -> bool:
        """Return True on all ranks if any of them has been asked to stop. A collective."""
        asked = self.stop.requested
        if self.world_size == 1:
            return asked
        votes = torch.tensor([int(asked)], device=self.device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def stop_cause(self) -> StopCause:
        """Return the cause on the lowest rank that was asked to stop, once one was. A collective."""
        return next(cause for cause in all_gather_object(self.stop.cause) if cause)

    def explain(self, error: Exception) -> Exception:
        """Return ``error``, or a :class:`RankLost` that names the rank at fault; publish an own error to all ranks."""
        if self.liveness is None or error is self._explained:
            return error
        self._explained = self._explain(error, self.liveness)
        return self._explained

    def _explain(self, error: Exception, liveness: Liveness) -> Exception:
        cause = error.__cause__ if isinstance(error, CheckpointFailed) else error
        if isinstance(cause, RankLost) or (isinstance(cause, RuntimeError) and not isinstance(cause, PartialFCError)):
            reason = liveness.explain()
            if reason:
                return RankLost(f"{reason} (seen by rank {self.rank}: {error})")
        liveness.report_failure(f"{error}" if isinstance(error, PartialFCError) else repr(error))
        return error

    def abort(self, reason: str) -> None:
        """End this process, whose main thread waits for a lost rank, from another thread."""
        for listener in self.on_lost:
            listener(reason)
        print(f"[rank {self.rank}] error: {printable(reason)}", file=sys.stderr, flush=True)
        os._exit(1)


@contextmanager
def joined(
    run_folder: Path | None, timeout: float, group_of_one: bool = False, timings: Timings = DEFAULT_TIMINGS
) -> Iterator[ProcessContext]:
    """Join the process group that torchrun's environment describes; without one, run as a single process.

    Args:
        run_folder: where the file ``stop`` may appear; None: only signals ask to stop.
        timeout: seconds of silence after which another rank, or the store by which the ranks join, counts as lost.
        group_of_one: give a single process a process group too; DeepSpeed needs one.

    Raises:
        ConfigError: on all ranks, if their software differs.
        RankLost: the ranks have not found each other.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    bound = device if on_gpu else None  # else barriers would guess the device
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        stop = StopRequest(run_folder)
        if group_of_one:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=bound)
        try:
            with stop.listening():
                yield ProcessContext(0, 1, device, stop, timings=timings)
        finally:
            if group_of_one:
                dist.destroy_process_group()
        return
    stop = StopRequest(run_folder if os.environ["RANK"] == "0" else None)
    facts = software(device)
    store, rank, world_size = fresh_store(LONG_TIMEOUT, timeout)
    with _connecting():
        # Before the group: ranks with another version, or with another kind of device, may not even form one.
        require_same_over(store, rank, world_size, facts)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=LONG_TIMEOUT, device_id=bound
        )
    process = ProcessContext(rank, world_size, device, stop, timings=timings)
    with stop.listening():  # only now: until all ranks are there, a launcher's SIGTERM should end the process
        try:
            with _connecting():
                process.liveness = Liveness(rank, world_size, timeout, stop, process.abort, timings)
                process.hosts = all_gather_object(socket.gethostname())
            try:
                yield process
            except Exception as error:  # an error before training; the trainer explains its own
                explained = process.explain(error)
                raise explained from (None if explained is error else error)
            dist.barrier()  # rank 0 may still be writing: the group stays until it is done
        finally:
            if process.liveness:
                process.liveness.close()
            dist.destroy_process_group()


@contextmanager
def _connecting() -> Iterator[None]:
    """Raise what goes wrong with the store or a connection as RankLost: the launcher, or a rank, has gone meanwhile."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"the ranks cannot connect to each other: {str(error).splitlines()[0]}") from error


def under_torchrun() -> bool:
    """Return True if torchrun started this process: it decides on the exit code, and restarts a failed worker."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def automatic_restarts() -> int:
    """Return the number of automatic restarts of this run that torchrun and Slurm report."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return sum(int(count) for count in counts if count.isdigit())
