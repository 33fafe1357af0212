"""Decisions of the torchrun launcher that need no training: options, environment, exit codes, requests to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from partialfc.launch import torchrun
from partialfc.launch.torchrun import Settings, Start, StopSignals


def test_one_host_runs_standalone(tmp_path: Path) -> None:
    settings = Settings.of({"NPROC": "2", "MAX_RESTARTS": "", "CONFIG": "x"})
    assert settings == Settings(nproc="2", max_restarts="3")
    options = settings.torchrun_options(tmp_path)
    assert options[0] == "--standalone"
    assert options[options.index("--max-restarts") + 1] == "3"
    assert options[options.index("--log-dir") + 1] == str(tmp_path)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in settings.environment({})


def test_many_hosts_meet_at_the_endpoint_and_wait_for_a_lost_one(tmp_path: Path) -> None:
    settings = Settings.of(
        {"NNODES": "3:4", "RDZV_ENDPOINT": "a:29400", "RDZV_CONF": "is_host=true", "LOCAL_ADDR": "10.0.0.2"}
    )
    options = settings.torchrun_options(tmp_path)
    for name, value in {
        "--nnodes": "3:4",
        "--rdzv-endpoint": "a:29400",
        "--rdzv-id": "partialfc",
        "--rdzv-conf": "read_timeout=600,is_host=true",
        "--local-addr": "10.0.0.2",
    }.items():
        assert options[options.index(name) + 1] == value
    assert settings.environment({})["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


@pytest.mark.parametrize(
    ("nproc", "gpus", "threads"), [("auto", 0, "1"), ("auto", 4, "3"), ("5", 4, "2"), ("gpu", 12, "1"), ("99", 0, "1")]
)
def test_the_cores_of_a_host_are_shared_among_its_ranks(
    monkeypatch: pytest.MonkeyPatch, nproc: str, gpus: int, threads: str
) -> None:
    monkeypatch.setattr(torchrun, "_cores", lambda: 12)
    monkeypatch.setattr(torchrun, "_gpus", lambda: gpus)
    assert Settings(nproc=nproc).environment({})["OMP_NUM_THREADS"] == threads


def test_variables_that_are_set_stay() -> None:
    own = {"OMP_NUM_THREADS": "7", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": ""}
    found = Settings().environment(own)
    assert found.items() >= own.items()
    assert Settings().environment({"NCCL_DEBUG": ""})["NCCL_DEBUG"] == "WARN"


@pytest.mark.parametrize(
    ("own_state", "code_file", "torchrun_code", "expected"),
    [
        ({"attempt": 1, "state": "finished"}, "", 0, 0),
        ({"attempt": 1, "state": "finished"}, "", 1, 0),  # a launcher that fails after the end of the run
        ({"attempt": 1, "state": "preempted"}, "", 0, 75),
        ({"attempt": 1, "state": "failed"}, "1\nrank 1: NaN\n", 1, 1),
        ({"attempt": 1, "state": "running"}, "", 1, 1),  # killed
        ({}, "2\noptim.lr: expected a number\n", 1, 2),
        ({}, "", 0, 0),  # state.json says that the run had finished before
        ({}, "", 1, 1),
    ],
)
def test_exit_codes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    own_state: dict[str, Any],
    code_file: str,
    torchrun_code: int,
    expected: int,
) -> None:
    (tmp_path / "state.json").write_text('{"attempt": 7, "state": "finished"}')
    start = Start(tmp_path, tmp_path / "own.json", tmp_path / "code")
    if own_state:
        (tmp_path / "own.json").write_text(json.dumps(own_state))
    if code_file:
        (tmp_path / "code").write_text(code_file)
    assert start.exit_code(torchrun_code, stopped=75) == expected
    reason = code_file.partition("\n")[2]
    assert capsys.readouterr().err == (f"error: {reason}" if reason else "")


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield StopSignals()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_becomes_a_request_once_the_own_start_has_begun(tmp_path: Path, signals: StopSignals) -> None:
    own, stop = tmp_path / "own.json", tmp_path / "stop"
    program = (
        "import pathlib, sys, time; own, stop = map(pathlib.Path, sys.argv[1:]); time.sleep(0.5)\n"
        "early = stop.exists(); own.write_text('{\"attempt\": 3}')\n"
        "while not stop.exists(): time.sleep(0.05)\n"
        "sys.exit(early)"
    )
    start = Start(tmp_path, own, tmp_path / "code")
    process = subprocess.Popen([sys.executable, "-c", program, str(own), str(stop)])
    os.kill(os.getpid(), signal.SIGUSR1)
    assert start.wait(process, signals) == 0, "the request came before the start had begun"
    assert stop.read_text().startswith("USR1 to launch/torchrun.sh on ")
    assert "\nstopped_by: launcher\n" in stop.read_text()
    start.remove_request()
    assert not stop.exists()


def test_a_request_of_somebody_else_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("Ann: the disk is moved\n")
    Start(tmp_path, None, tmp_path / "code").remove_request()
    assert (tmp_path / "stop").exists()


def test_a_damaged_state_is_no_state(tmp_path: Path) -> None:
    for text in ("", "{", "[1]"):
        (tmp_path / "state.json").write_text(text)
        assert Start(tmp_path, None, tmp_path / "code").exit_code(0, stopped=75) == 1


@pytest.mark.parametrize("settings", [Settings(nnodes="2"), Settings(stopped="yes")])
def test_wrong_settings_are_2(settings: Settings, signals: StopSignals, capsys: pytest.CaptureFixture[str]) -> None:
    assert torchrun.launch(["c.yaml"], settings, signals) == 2
    assert capsys.readouterr().err.startswith("error: ")
