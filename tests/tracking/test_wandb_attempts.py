"""State left by an attempt, and its use by the next one or `runs sync`; this process plays the trainer."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Literal

import pytest

from partialfc.config import WandbConfig
from partialfc.files import FileLock
from partialfc.tracking.wandb.lock import client_lock
from partialfc.tracking.wandb.run import start_wandb
from tests.harness.wandb_log import Logged
from tests.harness.wandb_runs import Run, client_of, clients, kill, processes, wait_for, warnings_of


def kill_all(run: Run, trainer: subprocess.Popen[bytes]) -> None:
    """Kill a trainer, which would start another client, and then what it has started."""
    trainer.kill()
    kill(run.path, signal.SIGKILL)
    trainer.wait()


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_sync_refuses_a_run_that_a_client_is_sending(run: Run, mode: Literal["online", "offline"]) -> None:
    attempt = run.followed(mode)
    run.train(3)
    run.wait_until_sent()
    done = run.sync()
    assert done.returncode == 1
    assert "is being sent by another process" in done.stderr
    assert not run.server.exits, "W&B takes the run for ended"
    run.train(4)
    run.ends("finished")
    attempt.close()
    done = run.sync()
    assert done.returncode == 0, done.stderr
    assert ("nothing to send" in done.stdout) == (mode == "online")
    assert run.steps() == list(range(1, 8))
    assert [end["code"] for end in run.server.exits] == [0]


def test_sync_refuses_a_run_that_is_training_although_no_client_sends_it(run: Run) -> None:
    attempt = run.followed("offline")
    run.train(3)
    run.wait_until_sent()
    attempt.close()
    lock = FileLock(run.path / ".lock")  # as the trainer holds it
    assert lock.acquire()
    done = run.sync()
    assert done.returncode == 1
    assert "the run is still training; sync it when it has ended" in done.stderr
    lock.release()
    run.train(4)
    run.ends("finished")
    done = run.sync()
    assert done.returncode == 0, done.stderr
    assert run.steps() == list(range(1, 8))
    assert "nothing to send" in run.sync().stdout


def test_an_online_attempt_first_sends_what_earlier_attempts_could_not(run: Run) -> None:
    run.server.behaviour = "failing"
    attempt = run.followed()
    run.train(5)
    attempt.close()
    assert list(run.path.glob("wandb/offline-run-*"))
    run.server.behaviour = "well"
    attempt = run.followed()
    run.train(5)
    run.ends("finished")
    attempt.close()
    assert run.steps() == list(range(1, 11))
    assert "nothing to send" in run.sync().stdout


def test_rows_lost_with_the_connection_or_with_killed_processes_are_sent_again(run: Run) -> None:
    trainer = run.followed_from_another_process()
    run.train(5)
    run.wait_until_taken()
    run.server.behaviour = "failing"
    run.train(5)
    run.wait_until_sent()
    kill_all(run, trainer)
    assert run.steps() == list(range(1, 6))
    run.server.behaviour = "well"
    trainer = run.followed_from_another_process()
    run.train(5)
    run.wait_until_taken()
    assert run.steps() == list(range(1, 16))
    kill_all(run, trainer)
    run.train(2)
    run.ends("preempted")
    assert run.sync().returncode == 0
    assert run.steps() == list(range(1, 18))
    assert [end["code"] for end in run.server.exits] == [1]
    assert "nothing to send" in run.sync().stdout


def test_the_signals_that_stop_a_job_lose_no_row(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Signals as Slurm sends them: to every process of the job, whatever its group and session."""
    attempt = run.followed()
    kill(run.path, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # before it has said or done anything
    run.train(5)
    run.wait_until_sent()
    kill(run.path, signal.SIGUSR1, signal.SIGTERM)
    run.train(5)  # the steps that the trainer still does
    run.wait_until_sent()
    kill(run.path, signal.SIGTERM, signal.SIGINT)  # when it waits for nothing but the end
    run.ends("preempted")
    attempt.close()
    assert run.steps() == list(range(1, 11))
    assert [end["code"] for end in run.server.exits] == [1]
    assert not warnings_of(capsys.readouterr().out)
    wait_for(lambda: not processes(run.path), "something stays behind", 10)


@pytest.mark.slow
def test_the_run_continues_offline_after_clients_keep_dying(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = run.followed()
    for _ in range(4):
        run.train(1)
        run.wait_until_sent()
        os.kill(client_of(run.path), signal.SIGKILL)
    run.train(1)
    run.ends("finished")
    attempt.close()
    (warning,) = warnings_of(capsys.readouterr().out)
    assert "its client has died; the run continues offline and can be sent later" in warning
    assert [row["step"] for row in Logged(run.path).rows][-1] == 5
    assert run.sync().returncode == 0
    assert run.steps() == list(range(1, 6))


def test_no_process_stays_behind_a_trainer_that_is_killed(run: Run) -> None:
    trainer = run.followed_from_another_process()
    run.train(5)
    run.wait_until_sent()
    assert len(processes(run.path)) == 3, "the trainer, the client and W&B's service"
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not processes(run.path), "something stays behind", 10)
    assert run.steps() == list(range(1, 6))
    assert [end["code"] for end in run.server.exits] == [1]


def test_a_client_that_waits_for_another_one_says_so_at_the_end_of_the_run(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "wandb").mkdir()
    with client_lock(run.path) as free:
        assert free
        attempt = run.followed()
        run.train(1)
        attempt.close()
    (warning,) = warnings_of(capsys.readouterr().out)
    assert "another process is still sending this run; the rest can be sent later" in warning
    assert run.sync().returncode == 0
    assert run.steps() == [1]


def test_a_client_that_does_not_end_is_killed_after_its_time(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = run.followed("offline")
    run.train(1)
    run.wait_until_sent()
    os.kill(client_of(run.path), signal.SIGSTOP)
    attempt.close_timeout = 1.0
    attempt.close()
    (warning,) = warnings_of(capsys.readouterr().out)
    assert "its client does not end" in warning
    wait_for(lambda: not clients(run.path), "it is not killed", 10)


def test_wandb_mode_disabled_switches_auto_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert start_wandb(tmp_path, WandbConfig(mode="auto")) is None
    assert not list(tmp_path.iterdir())
