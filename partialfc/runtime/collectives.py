"""Work of one rank or of all ranks, with an outcome that all ranks share."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from partialfc.errors import CheckpointFailed, PartialFCError

Group = dist.ProcessGroup | None
T = TypeVar("T")


def run_on_rank0(work: Callable[[], T]) -> T | None:
    """Run ``work`` on rank 0 and return its result there, None on the other ranks. A collective.

    Raises:
        Exception: on every rank, the one that ``work`` raised.
    """
    result, error = _try_on_rank0(work)
    _broadcast((None, error))
    return result


def broadcast_from_rank0(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result, which must be picklable, on every rank. A collective.

    Raises:
        Exception: on every rank, the one that ``work`` raised.
    """
    result: T = _broadcast(_try_on_rank0(work))
    return result


def run_alike(work: Callable[[], T]) -> T:
    """Run ``work``, which holds no collective, on every rank and return this rank's own result. A collective.

    Raises:
        PartialFCError: on every rank, the one of the lowest rank on which ``work`` failed; it names the rank, unless
            all ranks have failed alike.
    """
    result, error = None, None
    try:
        result = work()
    except PartialFCError as found:
        error = found
    errors = all_gather_object(error)
    failed = {rank: other for rank, other in enumerate(errors) if other is not None}
    if error is not None and len(failed) == len(errors) and len(set(map(str, errors))) == 1:
        raise error
    for rank, other in failed.items():
        raise type(other)(f"rank {rank}: {other}")
    return cast(T, result)


def run_on_all_ranks(work: Callable[[], Any], group: Group = None) -> list[Any]:
    """Run ``work`` on every rank and return the results in the order of the ranks. A collective.

    Raises:
        CheckpointFailed: on every rank, if ``work`` failed on any; the message names the rank.
    """
    mine: tuple[Any, str | None]
    try:
        mine = work(), None
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is not an Exception
        mine = None, reason_of(error)
    results = all_gather_object(mine, group)
    failed = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(results) if reason]
    if failed:
        raise CheckpointFailed(f"the checkpoint could not be written ({failed[0]})")
    return [value for value, _ in results]


def reason_of(error: BaseException) -> str:
    """Describe an error in one line: torch's CheckpointException quotes the trace of every rank."""
    cause: BaseException = error
    if isinstance(error, CheckpointFailed):
        return str(error)
    if isinstance(error, CheckpointException):
        cause = next(iter(error.failures.values()), (error,))[0]
    if isinstance(cause, RuntimeError) and isinstance(cause.__context__, OSError):  # raised while torch closed the file
        cause = cause.__context__
    return f"{type(cause).__name__}: {cause}".splitlines()[0] + _advice(cause)


def _advice(error: BaseException) -> str:
    """Return what to look at after an error in writing; '' where its own words say it."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE):
        return "; raise the limit of open files (ulimit -n), or close what else holds them open"
    # torch's writer raises RuntimeError when the disk is full.
    if number in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, RuntimeError):
        return "; is the disk full?"
    return ""


def all_gather_object(value: T, group: Group = None) -> list[T]:
    """Return the ``value`` of every rank, in the order of the ranks. A collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def is_rank0() -> bool:
    """Return True on rank 0, and in a process without a process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def rank_slice(names: list[str]) -> list[str]:
    """Return this rank's share of ``names``, every world_size-th: each name is on exactly one rank."""
    return names[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else names


def _try_on_rank0(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    if not is_rank0():
        return None, None
    try:
        return work(), None
    except Exception as error:
        return None, error


def _broadcast(outcome: tuple[Any, Exception | None]) -> Any:
    """Return the result that rank 0 passes, or raise its error, on every rank."""
    if dist.is_initialized():
        box = [outcome]
        dist.broadcast_object_list(box, src=0)
        outcome = box[0]
    result, error = outcome
    if error is not None:
        raise error
    return result
