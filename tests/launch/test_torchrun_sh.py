"""launch/torchrun.sh: its exit codes, requests to stop, and messages on wrong usage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness.running import ENVIRONMENT, events, finish, lines, started, state, steps_done, wait_until

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "torchrun.sh")
LAUNCH = [sys.executable, "-m", "partialfc.launch.torchrun"]  # what the script becomes; quicker, as it starts warm
LONG = ["optim.epochs=1000", "evaluation.every=0", "checkpoint.every=7"]
SHORT = ["optim.epochs=0.5", "evaluation.sets=[]"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "NPROC": "2", "MAX_RESTARTS": "0"}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)


def launch(*words: str | Path, script: bool = False) -> subprocess.CompletedProcess[str]:
    return finish([*([SCRIPT] if script else LAUNCH), *map(str, words)], seconds=240)


def test_a_finished_run_is_0_with_a_log_for_each_rank_and_again_at_once(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = launch(task, f"run.dir={folder}", *SHORT, script=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert state(folder)["state"] == "finished"
    logs = sorted(str(path.relative_to(folder)) for path in folder.glob("logs/*/attempt_0/*/stdout.log"))
    assert [path.split("/")[-2] for path in logs] == ["0", "1"]
    again = launch(task, f"run.dir={folder}", *SHORT)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to do" in again.stdout
    assert len(events(folder, "started")) == 1


@pytest.mark.parametrize(
    "request_by", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow), signal.SIGINT, "file"]
)
def test_a_stopped_run_is_75_with_a_checkpoint(task: Path, tmp_path: Path, request_by: signal.Signals | str) -> None:
    folder, output = tmp_path / "run", tmp_path / "output"
    launcher = [SCRIPT] if request_by == signal.SIGTERM else LAUNCH
    with started([*launcher, str(task), f"run.dir={folder}", *LONG], output) as process:
        wait_until(lambda: steps_done(folder) >= 3, seconds=180, of=process)
        if isinstance(request_by, signal.Signals):
            for _ in range(2):
                os.kill(process.pid, request_by)
                time.sleep(0.2)
        else:
            (folder / "stop").touch()
        assert process.wait(120) == 75, output.read_text()
    found = state(folder)
    assert found["state"] == "preempted"
    assert found["stopped_by"] == ("launcher" if request_by in (signal.SIGTERM, signal.SIGUSR1) else "person")
    assert ("the file" if request_by == "file" else request_by.name[3:]) in found["reason"]
    assert (folder / "checkpoints" / f"step-{found['step']:08d}" / "manifest.json").exists()
    assert len(lines(folder, "train")) == found["step"]
    assert not (folder / "stop").exists()


@pytest.mark.parametrize("elsewhere", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_request_that_comes_before_the_ranks_are_there_stops_them_at_their_first_steps(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    if elsewhere:  # the logs, so that nothing has made the run folder
        monkeypatch.setitem(ENVIRONMENT, "LOG_DIR", str(tmp_path / "logs"))
    folder, output = tmp_path / "run", tmp_path / "output"
    with started([SCRIPT, str(task), f"run.dir={folder}", *LONG], output) as process:
        time.sleep(1.0)  # the config is being read
        os.kill(process.pid, signal.SIGUSR1)
        assert process.wait(240) == 75, output.read_text()
    assert state(folder)["step"] < 100, "it is left as soon as they have begun"
    assert not (folder / "stop").exists()


def test_a_start_that_waits_for_another_in_the_run_folder_does_not_stop_that_one(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*LAUNCH, str(task), f"run.dir={folder}", *LONG]
    with started(words, tmp_path / "first") as first:
        wait_until(lambda: steps_done(folder) >= 3, seconds=180, of=first)
        with started([*words, "run.timeout=4"], tmp_path / "second") as second:
            wait_until(lambda: "waiting for the process" in (tmp_path / "second").read_text(), seconds=180, of=second)
            os.kill(second.pid, signal.SIGTERM)
            assert second.wait(120) == 2, (tmp_path / "second").read_text()
        assert not (folder / "stop").exists()
        before = steps_done(folder)
        wait_until(lambda: steps_done(folder) > before, of=first)


def test_a_failed_run_is_1_and_its_last_line_says_why(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = launch(task, f"run.dir={folder}", "optim.lr=1e30", "optim.clip=null", "run.skipped_in_a_row=1", *LONG)
    assert done.returncode == 1, done.stdout + done.stderr
    assert state(folder)["state"] == "failed"
    assert "steps in a row were skipped" in state(folder)["reason"]
    assert done.stderr.splitlines()[-1].startswith("error: 1 steps in a row were skipped")
    no_data = launch(task, f"run.dir={folder}", "data.train=/nowhere", "run.seed=4")
    assert no_data.returncode == 2, "starting it again cannot help"
    assert no_data.stderr.splitlines()[-1].startswith("error: ")
    assert "/nowhere" in no_data.stderr.splitlines()[-1]


def test_a_wrong_config_is_2_whoever_finds_it(task: Path, tmp_path: Path) -> None:
    before = launch(task, f"run.dir={tmp_path / 'run'}", "optim.lr=fast")
    assert before.returncode == 2
    assert "optim.lr" in before.stderr
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    no_place = launch(task, f"run.dir={tmp_path / 'file' / 'run'}", *SHORT)
    assert no_place.returncode == 2, no_place.stdout + no_place.stderr
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.json").write_text('{"state": "finished", "attempt": 1}')
    found_by_ranks = launch(task, f"run.dir={tmp_path / 'other'}", *SHORT)
    assert found_by_ranks.returncode == 2, found_by_ranks.stdout + found_by_ranks.stderr
    assert "holds a finished run of a different config" in found_by_ranks.stdout + found_by_ranks.stderr


def test_no_config_and_no_endpoint_are_wrong_usage(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = launch()
    assert usage.returncode == 2
    assert "launch/torchrun.sh CONFIG" in usage.stderr
    monkeypatch.setitem(ENVIRONMENT, "NNODES", "2")
    many = launch(task)
    assert many.returncode == 2
    assert "RDZV_ENDPOINT" in many.stderr
