"""launch/torchrun.sh with what no restart mends, and with an endpoint that does not exist."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from partialfc.launch import torchrun
from partialfc.launch.torchrun import Settings, Start, StopSignals
from tests.harness.running import ENVIRONMENT, finish, free_port, started, wait_until

LAUNCH = [sys.executable, "-m", "partialfc.launch.torchrun"]
SHORT = ["optim.epochs=0.25", "optim.warmup=0", "evaluation.sets=[]"]
UNKNOWN = "no-such-host.invalid:29400"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of the launcher; signal handlers that a test installs are taken away again."""
    root = str(Path(__file__).parents[2])
    for name, value in {"PYTHON": sys.executable, "PYTHONPATH": root, "NPROC": "2", "MAX_RESTARTS": "3"}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def attempts(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("logs/*/attempt_*")}


@pytest.mark.parametrize("setting", ["data.train=/nowhere", "evaluation.sets=[/nowhere]", "model.pretrained=/nowhere"])
def test_data_that_is_not_there_is_2_at_the_first_attempt(task: Path, tmp_path: Path, setting: str) -> None:
    folder = tmp_path / "run"
    done = finish([*LAUNCH, str(task), f"run.dir={folder}", *SHORT, setting], seconds=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert attempts(folder) == {"attempt_0"}
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "/nowhere" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stdout + done.stderr


def test_checkpoints_that_are_all_damaged_are_2_at_the_first_attempt(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    done = finish([*LAUNCH, str(task), f"run.dir={folder}", *SHORT], seconds=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert attempts(folder) == {"attempt_0"}
    assert "damaged" in done.stderr.splitlines()[-1]


def test_a_run_that_finished_once_does_not_hide_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.json").write_text('{"state": "finished", "attempt": 1}')
    (tmp_path / "code").write_text("2\nrun.dir: it is another one\n")
    assert Start(tmp_path, tmp_path / "own.json", tmp_path / "code").exit_code(0, stopped=75) == 2
    assert capsys.readouterr().err == "error: run.dir: it is another one\n"


def test_a_rank_that_refuses_alone_ends_a_torchrun_that_waits_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchrun, "_END_WITHIN", 0.3)
    (tmp_path / "code").write_text("2\noptim.lr: no number\n")
    start = Start(tmp_path, tmp_path / "own.json", tmp_path / "code")
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    assert start.wait(subprocess.Popen([sys.executable, "-c", deaf]), StopSignals()) == -signal.SIGKILL
    assert start.exit_code(-signal.SIGKILL, stopped=75) == 2


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_launcher_that_waits_for_an_unknown_host_takes_signals(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: list[signal.Signals]
) -> None:
    for name, value in {"NNODES": "2", "RDZV_ENDPOINT": UNKNOWN}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    output = tmp_path / "output"
    with started([*LAUNCH, str(task), f"run.dir={tmp_path}/run"], output) as process:
        wait_until(lambda: "waiting for the host no-such-host.invalid to be known" in output.read_text(), of=process)
        for number in numbers:
            process.send_signal(number)
        assert process.wait(20) == 75


def test_a_second_interrupt_ends_a_start_whose_other_hosts_have_not_come(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NNODES": "2", "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}"}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    output, folder = tmp_path / "output", tmp_path / "run"
    with started([*LAUNCH, str(task), f"run.dir={folder}"], output) as process:
        wait_until(lambda: (folder / "logs").exists(), of=process)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "got INT" in output.read_text(), of=process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75, output.read_text()
    assert not (folder / "stop").exists()


def test_a_start_that_does_not_begin_in_time_after_a_signal_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchrun, "_BEGIN_WITHIN", 0.3)
    signals = StopSignals()
    os.kill(os.getpid(), signal.SIGTERM)
    start = Start(tmp_path, tmp_path / "own.json", tmp_path / "code")
    code = start.wait(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]), signals)
    assert code == -signal.SIGTERM
    assert start.exit_code(code, stopped=75) == 75


@pytest.mark.parametrize(("endpoint", "problem"), [(UNKNOWN, "not known"), ("host:port", "expected host:port")])
def test_an_endpoint_that_stays_unknown_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], endpoint: str, problem: str
) -> None:
    monkeypatch.setattr(torchrun, "_KNOWN_WITHIN", 0.0)
    assert torchrun.launch(["c.yaml"], Settings(nnodes="2", rdzv_endpoint=endpoint), StopSignals()) == 2
    assert capsys.readouterr().err.startswith(f"error: RDZV_ENDPOINT={endpoint}: ")


def test_endpoints_as_torchrun_takes_them() -> None:
    for endpoint in ("localhost", "127.0.0.1:29400", "[::1]:29400"):
        assert torchrun._wait_for_host(endpoint, StopSignals()) == ""
