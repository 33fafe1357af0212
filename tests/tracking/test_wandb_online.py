"""W&B online, beside a trainer: servers on loopback ports, good and bad ones."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from partialfc.tracking.metrics import read_metrics
from tests.harness.running import lines
from tests.harness.wandb_log import Logged, assert_whole
from tests.harness.wandb_runs import (
    DEAD,
    KEY,
    LONGER,
    check_key_is_nowhere,
    client_of,
    clients,
    killed_after,
    partialfc,
    train,
    training,
    wait_for,
    warnings_of,
)
from tests.harness.wandb_server import Server


def test_a_killed_run_continues_as_the_same_run_on_the_server(task: Path, tmp_path: Path, server: Server) -> None:
    online = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
    killed_after(task, tmp_path, 25, *LONGER, "tracking.wandb.mode=auto", **online)
    done = train(task, tmp_path, *LONGER, "tracking.wandb.mode=auto", **online)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not warnings_of(done.stdout + done.stderr)
    assert server.keys == {KEY}
    ((run, rows),) = server.history.items()
    assert run == (tmp_path / "run" / "wandb" / "id.txt").read_text().strip()
    assert_whole(rows, steps=72, attempts=2)
    assert [end["code"] for end in server.exits] == [1, 0]
    assert server.config[run]["optim"]["value"]["epochs"] == 6.0
    assert server.summary[run]["best/plain/tar_at_far/1e-2"] > 0
    assert {artifact["artifactTypeName"] for artifact in server.artifacts} == {"checkpoint", "run_table"}
    assert not any("safetensors" in name or "distcp" in name for name in server.uploaded)
    assert not list((tmp_path / "run" / "wandb").glob("offline-*"))
    done = partialfc(tmp_path, "runs", "sync", str(tmp_path / "run"), **online)
    assert "nothing to send" in done.stdout
    check_key_is_nowhere(tmp_path)


def test_a_server_that_fails_mid_run_costs_one_warning_and_no_row(task: Path, tmp_path: Path) -> None:
    server = Server()
    online = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
    more = ["tracking.wandb.mode=online", "tracking.wandb.timeout=4"]
    with training(task, tmp_path, *LONGER, *more, **online) as process:
        wait_for(lambda: server.runs, "the run does not reach the server")
        server.behaviour = "failing"
        code = process.wait(120)
    output = (tmp_path / "output.txt").read_text()
    assert code == 0, output
    assert len(warnings_of(output)) == 1, output
    assert "can be sent later" in output
    assert len(lines(tmp_path / "run", "train")) == 72
    server.behaviour = "well"
    done = partialfc(tmp_path, "runs", "sync", str(tmp_path / "run"), **online)
    assert done.returncode == 0, done.stdout + done.stderr
    ((_, rows),) = server.history.items()
    assert_whole(rows, steps=72, attempts=1)
    server.close()


@pytest.mark.parametrize(
    "trouble", ["dead", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("failing", "silent"))]
)
def test_a_server_in_trouble_costs_the_training_one_warning_and_nothing_else(
    task: Path, tmp_path: Path, trouble: str
) -> None:
    server = Server(trouble) if trouble != "dead" else None
    more = ["tracking.wandb.mode=online", "tracking.wandb.timeout=4"]
    url = server.url if server else DEAD
    done = train(task, tmp_path, *more, WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout + done.stderr
    assert len(warnings_of(output)) == 1, output
    assert f"can be sent later: partialfc runs sync {tmp_path}/run" in output
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(1, 37))
    logged = Logged(tmp_path / "run")
    assert len(logged.rows) == len(read_metrics(tmp_path / "run" / "metrics.jsonl")), "all of it, offline"
    # A client that has come as far as to begin a run of its own has ended it as failed; the one that follows has not.
    assert logged.exit_codes[-1] == 0
    assert not clients(tmp_path / "run")
    check_key_is_nowhere(tmp_path)
    if server:
        assert server.requests
        server.behaviour = "failing"  # lets its threads end
        server.close()


def test_a_client_that_dies_is_followed_by_another_one(task: Path, tmp_path: Path, server: Server) -> None:
    online = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
    with training(task, tmp_path, *LONGER, "tracking.wandb.mode=online", **online) as process:
        sent = tmp_path / "run" / "wandb" / "sent.txt"
        wait_for(lambda: sent.exists() and sent.read_text(), "nothing is sent")
        os.kill(client_of(tmp_path / "run"), signal.SIGKILL)
        code = process.wait(120)
    output = (tmp_path / "output.txt").read_text()
    assert code == 0, output
    assert not warnings_of(output), output
    ((_, rows),) = server.history.items()
    assert_whole(rows, steps=72, attempts=1)
    assert server.exits[-1]["code"] == 0
    assert not clients(tmp_path / "run")
