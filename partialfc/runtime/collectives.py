"""Work that the ranks share, with an outcome that they agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from partialfc.errors import CheckpointFailed

Group = dist.ProcessGroup | None


def run_on_all_ranks(work: Callable[[], Any], group: Group = None) -> list[Any]:
    """What ``work`` gives on each rank; where it fails on one, in whatever way, the same error on all. A collective.

    Raises:
        CheckpointFailed: on every rank, if ``work`` failed on any; it names the rank.
    """
    mine: tuple[Any, str | None]
    try:
        mine = work(), None
    except (Exception, CheckpointException) as error:  # the others wait to hear of it; torch's is no Exception
        mine = None, reason_of(error)
    results = all_gather_object(mine, group)
    failed = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(results) if reason]
    if failed:
        raise CheckpointFailed(f"the checkpoint could not be written ({failed[0]})")
    return [value for value, _ in results]


def reason_of(error: BaseException) -> str:
    """In a line: torch's exception quotes the trace of every rank."""
    cause: BaseException = error
    if isinstance(error, CheckpointFailed):
        return str(error)
    if isinstance(error, CheckpointException):
        cause = next(iter(error.failures.values()), (error,))[0]
    # torch's own writer says RuntimeError where the disk is full.
    hint = "; is the disk full?" if isinstance(cause, OSError | RuntimeError) else ""
    return f"{type(cause).__name__}: {cause}".splitlines()[0] + hint


def all_gather_object(value: Any, group: Group = None) -> list[Any]:
    """Every rank's ``value``. A collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def run_on_rank0(work: Callable[[], Any]) -> Any:
    """What ``work`` gives on the first rank, on every rank; an error that it raises there, too. A collective."""
    if not dist.is_initialized():
        return work()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def is_rank0() -> bool:
    """Whether this process is the first rank, or alone."""
    return not dist.is_initialized() or dist.get_rank() == 0


def rank_slice(names: list[str]) -> list[str]:
    """Every world_size-th of ``names``: all ranks together have each once."""
    return names[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else names
