"""Temporary changes to this process, and work that is done on rank 0."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from partialfc.runtime.collectives import broadcast_from_rank0, run_on_rank0
from partialfc.runtime.process import LONG_TIMEOUT, ProcessContext, joined
from partialfc.runtime.stopping import StopRequest


def fail() -> None:
    raise KeyError("no such thing")


def test_an_exception_does_not_leave_a_relaxed_timeout_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts: list[timedelta] = []
    monkeypatch.setattr(ProcessContext, "_set_group_timeouts", lambda _, timeout: timeouts.append(timeout))
    process = ProcessContext(0, 1, torch.device("cpu"), StopRequest(None))
    process.set_timeout(30)
    with pytest.raises(KeyError), process.relaxed_timeout():
        fail()
    assert timeouts == [timedelta(seconds=30), LONG_TIMEOUT, timedelta(seconds=30)]


def test_an_exception_does_not_leave_a_group_of_one_behind() -> None:
    def fail_in_a_group() -> None:
        with joined(None, 30, group_of_one=True):
            assert dist.is_initialized()
            assert run_on_rank0(lambda: 3) == broadcast_from_rank0(lambda: 3) == 3
            fail()

    with pytest.raises(KeyError):
        fail_in_a_group()
    assert not dist.is_initialized()


@pytest.mark.parametrize("run", [run_on_rank0, broadcast_from_rank0])
def test_an_error_of_rank_0_is_raised(run: object) -> None:
    assert callable(run)
    with pytest.raises(KeyError, match="no such thing"):
        run(fail)
