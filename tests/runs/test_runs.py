"""State of runs: the list of run folders, and the state in a folder."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from partialfc.config import parse_config
from partialfc.runs.folder import RunFolder
from partialfc.runs.listing import describe_runs, find_runs
from partialfc.runs.state import record_failure
from tests.harness.running import command, events, finish, partialfc, started, state, steps_done, wait_until
from tests.harness.tasks import write_task


def write_run(folder: Path, state: str, updated: float, **more: Any) -> None:
    folder.mkdir(parents=True)
    values = {"state": state, "step": 500, "total_steps": 2000, "attempt": 2, "updated": updated, "reason": "", **more}
    (folder / "state.json").write_text(json.dumps(values))


@pytest.fixture
def several(tmp_path: Path) -> Path:
    now = time.time()
    write_run(tmp_path / "faces" / "r50", "running", now - 3, seconds_left=7205)
    metrics = [
        {"kind": "evaluation", "step": 400, "results": {"lfw": {"tar_at_far": {"0.001": 0.99, "0.0001": 0.9512}}}},
        {"kind": "train", "step": 480, "loss": 1.5, "target_cosine": 0.61, "samples_per_s": 4803.2},
        {"kind": "train", "step": 500, "loss": 1.25, "target_cosine": 0.625, "samples_per_s": 4711.9},
    ]
    text = "".join(json.dumps(line) + "\n" for line in metrics) + '{"kind": "train", "step": 5'
    (tmp_path / "faces" / "r50" / "metrics.jsonl").write_text(text)
    write_run(tmp_path / "faces" / "r100", "running", now - 4000, seconds_left=7205)
    write_run(tmp_path / "old", "finished", now - 90_000, step=2000)
    write_run(tmp_path / "bad", "failed", now - 60, reason="not heard from rank 3")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "state.json").write_text("[]")
    os.utime(tmp_path / "junk" / "state.json", (now - 70, now - 70))
    return tmp_path


def test_runs_are_listed_with_state_step_eta_and_last_metrics(several: Path) -> None:
    runs = {str(run.folder.relative_to(several)): run for run in find_runs(several)}
    assert {name: run.state for name, run in runs.items()} == {
        "faces/r50": "running",
        "faces/r100": "stalled",
        "old": "finished",
        "bad": "failed",
        "junk": "damaged",
    }
    assert next(iter(runs)) == "faces/r50", "the one that wrote last comes first"
    assert runs["faces/r50"].train["step"] == 500, "the torn line is none"
    text = describe_runs(several)
    row = next(line for line in text.splitlines() if line.startswith("faces/r50"))
    for word in (
        "running",
        "500/2,000",
        "25%",
        "2h00m",
        "1.250",
        "0.625",
        "4,712",
        "lfw TAR 0.9512 @ FAR 0.0001 (step 400)",
        "3s ago",
    ):
        assert word in row, word
    stalled = next(line for line in text.splitlines() if line.startswith("faces/r100 "))
    assert "stalled" in stalled
    assert "2h00m" not in stalled, "nobody knows when it ends"
    assert "faces/r100: no update for 1h06m" in text
    assert "bad: not heard from rank 3" in text


def test_a_single_run_folder_and_an_empty_one_are_no_errors(
    several: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert describe_runs(several / "old").splitlines()[1].startswith("old  finished")
    empty = tmp_path_factory.mktemp("empty")
    assert describe_runs(empty) == f"no runs below {empty}"


@pytest.mark.parametrize(
    "spoilt",
    [
        "{}",
        '{"state": "running", "step": "many", "total_steps": null, "attempt": [], "updated": null, "reason": null}',
        '{"state": "running", "updated": 1e400, "step": 1e999, "seconds_left": "soon"}',
        '{"state": "running", "updated": 9e12, "seconds_left": "soon"}',
        "[" * 100_000,
    ],
)
@pytest.mark.parametrize(
    "metrics",
    ["[]\n1\n{}\n", '{"kind": ["train"]}\n', '{"kind": "evaluation", "results": {"x": {"tar_at_far": {"y": 1}}}}'],
)
def test_a_spoilt_folder_does_not_hide_the_other_runs(several: Path, spoilt: str, metrics: str) -> None:
    folder = several / "spoilt"
    folder.mkdir()
    (folder / "state.json").write_text(spoilt)
    (folder / "metrics.jsonl").write_text(metrics)
    text = describe_runs(several)
    assert "old " in text
    assert "spoilt " in text


def test_the_list_is_refreshed_until_ctrl_c(several: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "partialfc", "runs", str(several), "--watch", "--every", "0.2"]
    with started(words, tmp_path / "output") as process:
        wait_until(lambda: (tmp_path / "output").read_text().count("\nrun ") >= 2, of=process)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_runs_lists_a_folder_whose_name_is_not_a_command(several: Path) -> None:
    for arguments in (["runs", several], ["runs", "list", several]):
        done = partialfc(*arguments)
        assert done.returncode == 0, done.stderr
        (row,) = [line for line in done.stdout.splitlines() if line.startswith("old ")]
        assert row.split()[:3] == ["old", "finished", "2,000/2,000"]
    for folder in ("junk", "nope"):
        done = partialfc("runs", "sync", several / folder)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: there is no run in {several}/{folder}")


def config_of(folder: Path, **tracking: Any) -> Any:
    return parse_config({"run": {"dir": str(folder)}, "data": {"train": "x"}, "tracking": tracking})


def test_the_state_stays_fresh_while_nothing_happens(tmp_path: Path) -> None:
    folder = RunFolder(config_of(tmp_path), total_steps=10, step=0, heartbeat=0.05)
    before = state(tmp_path)["updated"]
    folder.progress(3, 70.0)
    wait_until(lambda: state(tmp_path)["updated"] > before and state(tmp_path)["step"] == 3, seconds=10)
    assert state(tmp_path)["seconds_left"] == 70
    folder.set_state("preempted", 4, "because")
    time.sleep(0.3)
    assert state(tmp_path)["state"] == "preempted", "the last word stays"
    folder.close()


def test_a_failure_that_another_rank_has_written_is_not_overwritten(tmp_path: Path) -> None:
    folder = RunFolder(config_of(tmp_path), total_steps=10, step=0, heartbeat=0.05)
    record_failure(tmp_path, "rank 1: the disk is gone")
    time.sleep(0.3)
    assert state(tmp_path)["reason"] == "rank 1: the disk is gone"
    folder.close()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))
    words = command(
        config, 0, f"run.dir={tmp_path}/run", "checkpoint.every=0", "evaluation.every=0", "optim.epochs=1000"
    )
    with started(words, tmp_path / "first") as first:
        wait_until(lambda: steps_done(tmp_path / "run") >= 2, of=first)
        second = finish([*words, "run.timeout=1"])
        assert second.returncode == 2, second.stdout
        assert "waiting for the process that trains in" in second.stdout
        assert "has not ended within 1 s" in second.stderr
        assert first.poll() is None
        before = steps_done(tmp_path / "run")
        wait_until(lambda: steps_done(tmp_path / "run") > before, of=first)
    third = finish([*words[:-1], "optim.epochs=1"])
    assert third.returncode == 0, "the lock has died with its process"
    assert "waiting for the process" not in third.stdout + third.stderr


@pytest.mark.parametrize("ends", [False, True])
def test_a_start_that_waits_for_another_process_resumes_from_its_results(tmp_path: Path, ends: bool) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))
    folder = tmp_path / "run"
    epochs = "optim.epochs=12" if ends else "optim.epochs=1000"
    words = [f"run.dir={folder}", epochs, "evaluation.every=0", "evaluation.sets=[]"]
    with started(command(config, 0, *words), tmp_path / "first") as first:
        wait_until(lambda: steps_done(folder) >= 2, of=first)
        if ends:
            os.kill(first.pid, signal.SIGSTOP)
        with started(command(config, 2, *words), tmp_path / "second") as second:
            wait_until(lambda: "waiting for the process" in (tmp_path / "second").read_text(), of=second)
            if ends:
                os.kill(first.pid, signal.SIGCONT)
                assert first.wait(60) == 0, (tmp_path / "first").read_text()
                assert second.wait(60) == 0, (tmp_path / "second").read_text()
                assert len(events(folder, "started")) == 1, "there was nothing left to do"
                return
            os.kill(first.pid, signal.SIGTERM)
            assert first.wait(60) == 75, (tmp_path / "first").read_text()
            wait_until(lambda: len(events(folder, "started")) == 2, of=second)
            before, after = events(folder, "preempted")[0]["step"], events(folder, "started")[1]
            assert (after["step"], after["attempt"]) == (before, 2)


def test_an_evaluation_is_progress(tmp_path: Path) -> None:
    """Criterion of /healthz: a long evaluation is not a stalled run."""
    config = tmp_path / "config.yaml"
    tree = write_task(tmp_path)
    tree["optim"] |= {"epochs": 1 / 12, "warmup": 0}
    tree["evaluation"]["batch_size"] = 1
    config.write_text(yaml.safe_dump(tree))
    script = (
        "import sys\n"
        "from partialfc.config import load_config\n"
        "from partialfc.runtime.process import joined\n"
        "from partialfc.train.trainer import Trainer\n"
        "config = load_config(sys.argv[1])\n"
        "with joined(config.run.dir, config.run.timeout) as process:\n"
        "    trainer, seen = Trainer(config, process), []\n"
        "    process.on_progress.append(lambda: seen.append(trainer.step))\n"
        "    trainer.train()\n"
        "    print('signs', len(seen))\n"
    )
    done = finish([sys.executable, "-c", script, str(config)])
    assert done.returncode == 0, done.stderr
    signs = int(re.findall(r"signs (\d+)", done.stdout)[0])
    assert signs >= 72 + 74, "one for each batch of the two sets"
