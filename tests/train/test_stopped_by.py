"""``stopped_by`` of a run that was asked to stop, in ``state.json`` and ``metrics.jsonl``, whichever rank was asked."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.harness.running import TRAIN, events, ranks_of, state, steps_done, wait_until

LONG = ["optim.epochs=1000", "evaluation.every=0", "checkpoint.every=0"]


@pytest.mark.parametrize(
    ("request_by", "stopped_by", "reason"),
    [
        (signal.SIGTERM, "signal", "SIGTERM"),
        (signal.SIGINT, "person", "SIGINT"),
        ("Ann: before SIGTERM comes\n", "person", "Ann: before SIGTERM comes"),
        ("a supervisor\nstopped_by: launcher\n", "launcher", "a supervisor"),
    ],
)
def test_a_stopped_run_records_who_asked(
    task: Path, tmp_path: Path, request_by: signal.Signals | str, stopped_by: str, reason: str
) -> None:
    folder = tmp_path / "run"
    words = [sys.executable, *TRAIN, str(task), f"run.dir={folder}", *LONG]
    with (tmp_path / "output").open("w") as output, ranks_of(words, 2, stdout=output, stderr=output) as (first, second):
        wait_until(lambda: steps_done(folder) >= 2, of=first)
        assert state(folder)["stopped_by"] is None
        if isinstance(request_by, signal.Signals):
            second.send_signal(request_by)
        else:
            (folder / "stop").write_text(request_by)
        assert (first.wait(60), second.wait(60)) == (0, 0), (tmp_path / "output").read_text()
    found, event = state(folder), events(folder, "preempted")[0]
    assert (found["state"], found["stopped_by"], event["stopped_by"]) == ("preempted", stopped_by, stopped_by)
    assert found["reason"].startswith(f"asked to stop by {reason}")
