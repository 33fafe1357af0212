"""Training over two hosts whose connection is cut in mid-run and mended."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.harness import running
from tests.harness.running import ENVIRONMENT, children, events, finish, lines, started, state, steps_done, wait_until
from tests.harness.tasks import write_task
from tests.harness.two_hosts import TwoHosts, two_hosts, why_not

ROOT = Path(__file__).parents[2]
TIMEOUT = 15  # seconds, run.timeout
SETTINGS = ["evaluation.every=0", "evaluation.sets=[]", "checkpoint.every=4", "optim.lr=0.02", f"run.timeout={TIMEOUT}"]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    reason = why_not()
    if reason:
        pytest.skip(f"no two hosts here: {reason}")
    with two_hosts(tmp_path) as found:
        yield found


def ranks_below(pid: int) -> int:
    """Number of ranks that a launcher runs."""
    found = 0
    for child in children(pid):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found += any(word.startswith(b"LOCAL_RANK=") for word in environment)
    return found


def command(hosts: TwoHosts, host: int, task: Path, folder: Path, *more: str) -> list[str]:
    script = str(ROOT / "launch" / "torchrun.sh")
    return hosts.command(host, script, str(task), f"run.dir={folder}", *SETTINGS, *more)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cut_between_hosts_ends_the_ranks_in_time_and_they_resume_once_it_is_mended(
    hosts: TwoHosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "NPROC": "1", "NNODES": "2"}
    for name, value in {**settings, "RDZV_ENDPOINT": "host-a:29400"}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    task = tmp_path / "config.yaml"
    task.write_text(yaml.safe_dump(write_task(tmp_path)))
    folder, length = tmp_path / "run", "optim.epochs=8"
    outputs = [tmp_path / "output-a", tmp_path / "output-b"]
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(started(command(hosts, host, task, folder, length), outputs[host])) for host in (0, 1)
        )
        wait_until(lambda: (folder / "checkpoints" / "step-00000008").exists(), seconds=180, of=first)
        hosts.cable("down")
        cut = time.monotonic()
        wait_until(lambda: ranks_below(first.pid) == ranks_below(second.pid) == 0, seconds=TIMEOUT + 45)
        assert time.monotonic() - cut > TIMEOUT / 2, "a short break would have been waited for"
        assert "not heard from rank 1" in state(folder)["reason"]
        done_before = steps_done(folder)
        hosts.cable("up")
        wait_until(lambda: steps_done(folder) > done_before and state(folder)["attempt"] == 2, seconds=240, of=first)
        (folder / "stop").touch()
        assert [first.wait(120), second.wait(120)] == [75, 75], outputs[0].read_text() + outputs[1].read_text()
    assert events(folder, "started")[-1]["step"] >= 8
    assert "not heard from rank 1" in outputs[0].read_text()
    assert "the network to it is gone" in outputs[1].read_text()
    train, whole = lines(folder, "train"), tmp_path / "whole"
    assert [line["step"] for line in train] == list(range(1, len(train) + 1))
    settings = [*SETTINGS, length, "checkpoint.every=0", "run.timeout=60"]
    assert finish(running.command(task, 2, f"run.dir={whole}", *settings), seconds=300).returncode == 0
    for mine, other in zip(train, lines(whole, "train"), strict=False):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5), mine["step"]
