"""This process among the ranks of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from partialfc.errors import CheckpointFailed, PartialFCError, RankLost
from partialfc.runtime.collectives import all_gather_object
from partialfc.runtime.liveness import Liveness
from partialfc.runtime.rendezvous import fresh_store
from partialfc.runtime.stopping import StopRequest

# What may take long on one rank while the others wait: imports, compilers and caches before the first step, the writing
# of a checkpoint, an evaluation.
PATIENCE = timedelta(minutes=60)


@dataclass
class ProcessContext:
    """Where this process stands."""

    rank: int
    world_size: int
    device: torch.device
    stop: StopRequest
    liveness: Liveness | None = None
    timeout: timedelta = PATIENCE
    #: Called now and then, by the main thread, as it goes on.
    on_progress: list[Callable[[], None]] = field(default_factory=list)
    #: Called by a thread, with the reason, when another rank is lost; the process ends right after.
    on_lost: list[Callable[[str], None]] = field(default_factory=list)
    _groups: list[dist.ProcessGroup] = field(default_factory=list)  # besides that of all ranks
    _explained: Exception | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def set_timeout(self, seconds: float) -> None:
        """From now on a collective that takes longer than ``seconds`` fails."""
        self.timeout = timedelta(seconds=seconds)
        self._set_group_timeouts(self.timeout)

    def watch(self, group: dist.ProcessGroup) -> None:
        """Have the collectives of one more group fail in time, too."""
        self._groups.append(group)
        self._set_group_timeouts(self.timeout)

    @contextmanager
    def relaxed_timeout(self) -> Iterator[None]:
        """Within, collectives may take long: another rank writes or evaluates meanwhile."""
        self._set_group_timeouts(PATIENCE)
        yield
        self._set_group_timeouts(self.timeout)

    def _set_group_timeouts(self, timeout: timedelta) -> None:
        if dist.is_initialized():
            for group in (dist.group.WORLD, *self._groups):
                # The only way torch offers to change the timeout of a group that exists.
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def enter(self, step: int, phase: str) -> None:
        """Say how far this rank is, for the others to know who keeps them waiting."""
        if self.liveness:
            self.liveness.enter(step, phase)

    def goes_on(self) -> None:
        """Say that this rank is at work, where no step tells so."""
        for tell in self.on_progress:
            tell()

    def agree_to_stop(self) -> bool:
        """Whether any rank has been asked to stop. A collective."""
        asked = self.stop.requested
        if self.world_size == 1:
            return asked
        votes = torch.tensor([int(asked)], device=self.device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def why_stop(self) -> str:
        """Who has asked to stop, in words. A collective."""
        return next((reason for reason in all_gather_object(self.stop.reason) if reason), "a request")

    def explain(self, error: Exception) -> Exception:
        """A failure in words that name the rank at fault, here or elsewhere; tells the other ranks of one here."""
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

    def lost(self, reason: str) -> None:
        """End this process, which waits for a rank that will not come, whatever its main thread is doing."""
        for tell in self.on_lost:
            tell(reason)
        print(f"[rank {self.rank}] error: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


@contextmanager
def joined(run_folder: Path | None, timeout: float, group_of_one: bool = False) -> Iterator[ProcessContext]:
    """Join the process group that torchrun's environment describes; without one, a single process.

    Args:
        run_folder: where the file ``stop`` would appear; None: only signals are requests.
        timeout: seconds of silence after which another rank counts as lost.
        group_of_one: give a single process a group, too, for what cannot do without.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    alone = "RANK" not in os.environ or "WORLD_SIZE" not in os.environ
    stop = StopRequest(run_folder if alone or os.environ["RANK"] == "0" else None)
    backend = "nccl" if on_gpu else "gloo"
    if alone:
        if group_of_one:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        with stop.listening():
            yield ProcessContext(0, 1, device, stop)
        if group_of_one:
            dist.destroy_process_group()
        return
    store, number, world_size = fresh_store(PATIENCE)
    dist.init_process_group(backend, store=store, rank=number, world_size=world_size, timeout=PATIENCE)
    process = ProcessContext(number, world_size, device, stop)
    with stop.listening():  # not before: until all are there, a launcher's SIGTERM had better end the process
        try:
            process.liveness = Liveness(process.rank, process.world_size, timeout, stop, process.lost)
            try:
                yield process
            except Exception as error:  # before training begins; later it has been explained
                explained = process.explain(error)
                raise explained from (None if explained is error else error)
            dist.barrier()  # rank 0 may still be writing: nobody tears the group down before it is done
        finally:
            if process.liveness:
                process.liveness.close()
            dist.destroy_process_group()


def under_torchrun() -> bool:
    """Whether torchrun has started this process: it answers for the exit codes, and restarts what fails."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def automatic_restarts() -> int:
    """How often torchrun and Slurm have started this run again by themselves, as far as they tell."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return sum(int(count) for count in counts if count.isdigit())
