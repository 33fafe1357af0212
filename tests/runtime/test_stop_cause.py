"""Who asked a run to stop: in the file ``stop``, by a signal, and agreed among ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from partialfc.runtime.process import ProcessContext
from partialfc.runtime.stopping import StopCause, StoppedBy, StopRequest
from tests.harness.ranks import Ranks


@pytest.mark.parametrize(
    ("text", "by", "words"),
    [
        (b"", "person", ""),
        (b"\n\n", "person", ""),
        (b"Ann: the disk is moved\n", "person", "Ann: the disk is moved"),
        (
            b"Ann: SIGTERM from Slurm, stopped_by: launcher",
            "person",
            "Ann: SIGTERM from Slurm, stopped_by: launcher",
        ),
        (b"supervisor\nstopped_by: nobody\n", "person", "supervisor"),
        (b"supervisor\nstopped_by: launcher\njob: 7\n", "launcher", "supervisor"),
        (b"supervisor\r\nstopped_by: launcher\r\n", "launcher", "supervisor"),
        (b"\nstopped_by: launcher", "launcher", ""),
        (b"\xff\x00" * 5000, "person", "\ufffd\x00" * 100),
    ],
)
def test_the_file_says_who_asks_in_a_field_and_why_in_its_first_line(
    tmp_path: Path, text: bytes, by: str, words: str
) -> None:
    (tmp_path / "stop").write_bytes(text)
    stop = StopRequest(tmp_path)
    assert stop.requested
    assert stop.cause == StopCause(
        StoppedBy(by), f"{words} (the file {tmp_path / 'stop'})" if words else f"the file {tmp_path / 'stop'}"
    )


def test_a_folder_in_place_of_the_file_is_a_persons_request(tmp_path: Path) -> None:
    (tmp_path / "stop").mkdir()
    stop = StopRequest(tmp_path)
    assert stop.requested
    assert stop.cause == StopCause(StoppedBy.PERSON, f"the file {tmp_path / 'stop'}")


@pytest.mark.parametrize("by", list(StoppedBy))
def test_a_cause_is_read_as_it_was_written(by: StoppedBy) -> None:
    cause = StopCause(by, "TERM to launch/torchrun.sh on n2, job 7")
    assert StopCause.from_text(cause.to_text()) == cause


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("numbers", "by"),
    [
        ([signal.SIGTERM], "signal"),
        ([signal.SIGUSR1], "signal"),
        ([signal.SIGINT], "person"),
        ([signal.SIGINT, signal.SIGTERM], "person"),  # the first one counts
    ],
)
def test_ctrl_c_is_a_person_and_other_signals_are_not(numbers: list[signal.Signals], by: str) -> None:
    stop = StopRequest(None)
    with stop.listening():
        for number in numbers:
            os.kill(os.getpid(), number)
        assert stop.requested
    assert stop.cause == StopCause(StoppedBy(by), numbers[0].name)


def agreed(_: dist.ProcessGroup, requests: dict[int, StopCause]) -> StopCause:
    process = ProcessContext(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), StopRequest(None))
    if process.rank in requests:
        process.stop.request(requests[process.rank])
    assert process.agree_to_stop()
    return process.stop_cause()


def test_all_ranks_take_the_cause_of_the_lowest_that_was_asked(ranks: Ranks) -> None:
    requests = {2: StopCause(StoppedBy.LAUNCHER, "USR1"), 3: StopCause(StoppedBy.PERSON, "the file")}
    assert ranks.run(4, agreed, requests) == [requests[2]] * 4
