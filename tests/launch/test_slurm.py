"""Jobs on a real Slurm of three nodes: to the end, over time limits, without a node, cancelled, in an array."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.harness.running import events, lines, run, state, steps_done
from tests.harness.slurm_cluster import ENDED, Cluster, cluster, why_not
from tests.harness.wandb_log import Logged, assert_whole

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "launch" / "slurm"
LONG = ["optim.epochs=1000", "evaluation.every=0", "checkpoint.every=7"]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=f"no Slurm here: {why_not()}"),
]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MAX_RESTARTS": "0"}
    with cluster() as found:
        found.environment |= settings
        yield found


def submit(slurm: Cluster, folder: Path, options: list[str], script: str, *words: str | Path) -> str:
    """The number of a job whose output lies in ``folder``."""
    options = [*options, f"--chdir={folder}", "--output=%j.out"]
    return slurm.run("sbatch", "--parsable", *options, str(SCRIPTS / script), *map(str, words)).strip()


def output(folder: Path) -> str:
    """What jobs have printed below ``folder``, where checkpoints may disappear meanwhile."""
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names if name.endswith(".out")]
    return "\n".join(path.read_text() for path in sorted(files))


def wait_for_step(slurm: Cluster, job: str, folder: Path, step: int, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while steps_done(folder / "run") < step:
        assert time.monotonic() < deadline, output(folder)
        assert slurm.job(job)["JobState"] not in ENDED, output(folder)
        time.sleep(0.1)


def assert_checkpoint_of_its_last_step(folder: Path) -> None:
    step = state(folder)["step"]
    assert (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()


@pytest.mark.parametrize("script", ["train.sbatch", "sweep.sbatch", "evaluate.sbatch"])
def test_slurm_would_take_every_script(slurm: Cluster, script: str) -> None:
    slurm.run("sbatch", "--test-only", str(SCRIPTS / script), "x")
    slurm.run("sbatch", "--test-only", "--nodes=3", "--gpus-per-node=2", "--time=30", str(SCRIPTS / script), "x")


def test_two_nodes_train_to_the_end_from_a_copy_of_the_data_and_are_evaluated(
    slurm: Cluster, task: Path, tmp_path: Path
) -> None:
    folder, cache = tmp_path / "lr50%j", tmp_path / "own disk"
    command = [sys.executable, "-m", "partialfc", "launch", "slurm", str(task), "run.dir=lr50%j", "optim.epochs=1"]
    options = ["--nodes=2", "--time=10", "--gpus-per-node=1", "--cpus-per-task=2", f"--cache={cache}"]
    options.append("--sbatch=--comment=with spaces in it")
    said = slurm.run(*command, *options, cwd=tmp_path)
    job = said.split("job ")[1].split(":")[0]
    found = slurm.wait_for(job, *ENDED)
    assert found["JobState"] == "COMPLETED", output(folder)
    assert state(folder)["state"] == "finished"
    assert "over 2 ranks" in output(folder)
    assert "on 2 nodes (n[1-2]), 1 ranks each" in output(folder)
    assert [line["step"] for line in lines(folder, "train")] == list(range(1, 13))
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["train"].startswith(f"{cache}/train-")
    assert len(list(cache.iterdir())) == 1, "nothing half copied"
    other = task.parent / "verification"
    job = submit(slurm, tmp_path, [], "evaluate.sbatch", folder, "--set", other)
    assert slurm.wait_for(job, *ENDED)["JobState"] == "COMPLETED", output(tmp_path)
    (evaluated,) = (folder / "evaluation").glob("step-00000012-verification-*.json")
    again = json.loads(evaluated.read_text())
    known = lines(folder, "evaluation")[-1]["results"]
    assert again["plain"]["tar_at_far"] == pytest.approx(known["plain"]["tar_at_far"])


def test_a_job_continues_past_its_time_limit_as_if_there_were_none(slurm: Cluster, task: Path, tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    settings = ["optim.epochs=13", "optim.lr=0.02"]
    slow = ["evaluation.every=1", "checkpoint.every=1", "checkpoint.asynchronous=false", f"run.dir={folder}"]
    sets = f"evaluation.sets=[{task.parent / 'verification'}]"
    slow.append("tracking.wandb.mode=offline")
    options = ["--nodes=2", "--time=1", "--signal=B:USR1@30"]
    job = submit(slurm, tmp_path, options, "train.sbatch", task, *settings, *slow, sets)
    deadline = time.monotonic() + 500
    while int(slurm.job(job)["Restarts"]) < 2:
        assert time.monotonic() < deadline, output(tmp_path)
        assert slurm.job(job)["JobState"] not in ENDED, output(tmp_path)
        time.sleep(0.3)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    assert run(task, 2, f"run.dir={whole}", *settings, "evaluation.sets=[]").returncode == 0
    assert slurm.wait_for(job, *ENDED, seconds=500)["JobState"] == "COMPLETED", output(tmp_path)
    begun = [line["step"] for line in events(folder, "started")]
    assert len(begun) >= 3
    assert begun == sorted(begun), "no start went back behind a checkpoint"
    assert begun[-1] > 0, "and they got further; on a busy machine one may not get to a checkpoint of its own"
    assert state(folder)["attempt"] == len(begun)
    train = lines(folder, "train")
    assert [line["step"] for line in train] == list(range(1, 157))
    for mine, other in zip(train, lines(whole, "train"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5), mine["step"]
    logged = Logged(folder)
    assert set(logged.ids) == {(folder / "wandb" / "id.txt").read_text().strip()}, "one run of W&B, through it all"
    assert len(logged.files) == len(begun)
    assert_whole(logged.rows, steps=156, attempts=len(begun))


def test_a_cancelled_job_stops_with_a_checkpoint_and_is_not_requeued(
    slurm: Cluster, task: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submit(slurm, tmp_path, ["--nodes=2"], "train.sbatch", task, f"run.dir={folder}", *LONG)
    wait_for_step(slurm, job, tmp_path, 5)
    slurm.run("scancel", job)
    found = slurm.wait_for(job, *ENDED)
    deadline = time.monotonic() + 30
    while state(folder)["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found["JobState"] == "CANCELLED"
    assert found["Restarts"] == "0"
    assert state(folder)["state"] == "preempted", output(tmp_path)
    assert_checkpoint_of_its_last_step(folder)


def test_a_job_ends_with_3_if_somebody_stops_it_and_continues_if_one_that_waits_for_it_is_cancelled(
    slurm: Cluster, task: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submit(slurm, tmp_path, [], "train.sbatch", task, f"run.dir={folder}", *LONG)
    wait_for_step(slurm, job, tmp_path, 3)
    other = submit(slurm, tmp_path, [], "train.sbatch", task, f"run.dir={folder}", *LONG)
    deadline = time.monotonic() + 120
    while "waiting for the process" not in output(tmp_path):
        assert time.monotonic() < deadline, output(tmp_path)
        time.sleep(0.1)
    slurm.run("scancel", other)
    while slurm.run("squeue", "-h", "-j", other, check=False).strip():
        assert time.monotonic() < deadline, output(tmp_path)
        time.sleep(0.1)
    assert not (folder / "stop").exists()
    wait_for_step(slurm, job, tmp_path, steps_done(folder) + 1)
    (folder / "stop").write_text("Ann: before Slurm sends SIGTERM\n")
    found = slurm.wait_for(job, *ENDED)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "3:0", "0"), output(tmp_path)
    assert_checkpoint_of_its_last_step(folder)


def test_a_node_that_goes_down_in_mid_run_is_survived(slurm: Cluster, task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [f"run.dir={folder}", "optim.epochs=20", "evaluation.every=0", "evaluation.sets=[]", "run.timeout=30"]
    job = submit(slurm, tmp_path, ["--nodes=2"], "train.sbatch", task, *settings, "checkpoint.every=4")
    wait_for_step(slurm, job, tmp_path, 10)
    node = slurm.run("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).split()[1]
    try:
        slurm.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        found = slurm.wait_for(job, *ENDED, seconds=400)
    finally:
        slurm.run(
            "scontrol", "update", f"NodeName={node}", "State=RESUME", check=False
        )  # if it has not come back by itself
    assert found["JobState"] == "COMPLETED", output(tmp_path)
    assert found["Restarts"] == "1"
    assert node not in slurm.run("scontrol", "show", "hostnames", found["NodeList"]).split()
    assert [line["step"] for line in events(folder, "started")][-1] >= 8
    assert [line["step"] for line in lines(folder, "train")] == list(range(1, 241))


def test_a_rank_that_fails_for_good_ends_the_whole_job_and_a_mistake_does_before_it_starts(
    slurm: Cluster, task: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    broken = ["optim.lr=1e30", "optim.clip=null", "run.skipped_in_a_row=1", *LONG]
    job = submit(slurm, tmp_path, ["--nodes=2"], "train.sbatch", task, f"run.dir={folder}", *broken)
    wrong = submit(slurm, tmp_path, ["--nodes=1"], "train.sbatch", task, "optim.speed=1")
    command = [sys.executable, "-m", "partialfc", "launch", "slurm", str(task), "run.dir=none", "data.train=/nowhere"]
    printed = tmp_path / "elsewhere" / "job.sbatch"
    printed.parent.mkdir()
    printed.write_text(slurm.run(*command, "--nodes=1", "--time=20", "--dry-run", cwd=tmp_path))
    early = slurm.run("sbatch", "--parsable", str(printed), cwd=printed.parent).strip()
    found = slurm.wait_for(job, *ENDED)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "1:0", "0"), output(tmp_path)
    assert "steps in a row were skipped" in state(folder)["reason"]
    assert slurm.wait_for(wrong, *ENDED)["ExitCode"] == "2:0", output(tmp_path)
    assert slurm.wait_for(early, *ENDED)["ExitCode"] == "2:0", output(tmp_path)
    assert "error: /nowhere is not a complete data set folder" in (tmp_path / f"slurm-{early}.out").read_text()


def test_requeues_without_progress_are_given_up(slurm: Cluster, task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [f"run.dir={folder}", "optim.epochs=1000", "evaluation.every=0", "checkpoint.every=0"]
    settings.append("run.restarts_without_progress=0")
    job = submit(slurm, tmp_path, [], "train.sbatch", task, *settings)
    wait_for_step(slurm, job, tmp_path, 3)
    slurm.run("scontrol", "requeue", job)
    slurm.wait_for(job, "PENDING")
    shutil.rmtree(folder / "checkpoints")  # as if it had been killed before it could write one
    found = slurm.wait_for(job, *ENDED)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "1:0", "1"), output(tmp_path)
    assert "1 restart in a row made no progress beyond step 0" in state(folder)["reason"]


def test_an_array_trains_each_line_of_a_list(slurm: Cluster, task: Path, tmp_path: Path) -> None:
    settings = "optim.epochs=0.5 evaluation.sets=[]"
    rows = [f"{task} 'run.dir={tmp_path / name}' optim.lr={lr} {settings}" for name, lr in (("a", 0.1), ("b b", 0.2))]
    (tmp_path / "list").write_text("\n".join(rows) + "\n")
    job = submit(slurm, tmp_path, ["--array=1-2"], "sweep.sbatch", tmp_path / "list", "run.seed=5")
    for index in (1, 2):
        assert slurm.wait_for(f"{job}_{index}", *ENDED)["JobState"] == "COMPLETED", output(tmp_path)
    for name, lr in (("a", 0.1), ("b b", 0.2)):
        assert state(tmp_path / name)["state"] == "finished"
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert (config["optim"]["lr"], config["run"]["seed"]) == (lr, 5)
