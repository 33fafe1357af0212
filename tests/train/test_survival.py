"""Ranks that die, stop or lose a node, under torchrun: the run comes back and ends like an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from partialfc.config import load_config
from partialfc.runs.restarts import GivenUp, count_restarts
from tests.harness.running import (
    TRAIN,
    TRAIN_HURRIED,
    children,
    command,
    events,
    finish,
    free_port,
    lines,
    run,
    started,
    state,
    steps_done,
    torchrun,
    wait_until,
    workers,
)
from tests.harness.tasks import write_task

TORCHRUN_SH = Path(__file__).parents[2] / "launch" / "torchrun.sh"
FAULTY = str(Path(__file__).parents[1] / "harness" / "faulty_run.py")
SETTINGS = ["evaluation.every=0", "evaluation.sets=[]", "optim.epochs=5", "checkpoint.every=4", "optim.lr=0.005"]
STEPS = 60


# From its second step on DDP lays out its buckets anew, and with them the order in which three ranks sum gradients.
# A restarted run does so a step later than an uninterrupted one; rounding differs, and that grows with the steps.
SUMMED_IN_ANOTHER_ORDER = 2e-3


def assert_undisturbed(task: Path, folder: Path, ranks: int, tolerance: float, *more: str) -> None:
    """Check that the run in ``folder`` has the loss curve of an undisturbed one on ``ranks`` ranks."""
    whole_folder = task.parent / "-".join(["whole", str(ranks), *more])
    if not whole_folder.exists():
        done = run(task, ranks, f"run.dir={whole_folder}", *SETTINGS, *more)
        assert done.returncode == 0, done.stdout + done.stderr
    whole, train = lines(whole_folder, "train"), lines(folder, "train")
    assert [line["step"] for line in train] == [line["step"] for line in whole], "no step lost or twice"
    assert [line["samples"] for line in train] == [line["samples"] for line in whole]
    for mine, other in zip(train, whole, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=tolerance), mine["step"]


def kill_a_rank_again_and_again(task: Path, folder: Path, kills: int, seed: int, *more: str) -> None:
    rng = random.Random(seed)
    words = [*torchrun(3, "--max-restarts", str(kills + 1)), *TRAIN_HURRIED, str(task), f"run.dir={folder}", *SETTINGS]
    with started([*words, *more], folder.with_suffix(".log")) as process:
        for number in range(kills):
            due = rng.randrange(10 * number, 10 * number + 9)
            wait_until(
                lambda number=number, due=due: len(events(folder, "started")) > number and steps_done(folder) >= due
            )
            time.sleep(rng.random() / 10)
            os.kill(rng.choice(workers(process.pid)), signal.SIGKILL)
        assert process.wait(120) == 0, folder.with_suffix(".log").read_text()
    assert state(folder)["state"] == "finished"
    assert len(events(folder, "started")) == kills + 1


def test_a_rank_that_is_killed_comes_back_with_the_others(task: Path, tmp_path: Path) -> None:
    kill_a_rank_again_and_again(task, tmp_path / "run", 1, 1)
    assert_undisturbed(task, tmp_path / "run", 3, SUMMED_IN_ANOTHER_ORDER)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_at_random_points_leave_the_loss_curve_unchanged(task: Path, tmp_path: Path) -> None:
    long = "optim.epochs=10"
    kill_a_rank_again_and_again(task, tmp_path / "run", 10, 2, long)
    assert_undisturbed(task, tmp_path / "run", 3, SUMMED_IN_ANOTHER_ORDER, long)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_that_stops_in_mid_run_is_lost_and_replaced(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*torchrun(2, "--max-restarts", "2"), *TRAIN_HURRIED, str(task), f"run.dir={folder}", *SETTINGS]
    with started([*words, "run.timeout=5"], tmp_path / "output") as process:
        wait_until(lambda: steps_done(folder) >= 5, of=process)
        victim = workers(process.pid)[1]
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda: events(folder, "failed"), of=process)
        os.kill(victim, signal.SIGKILL)  # else torchrun does, half a minute later
        assert process.wait(240) == 0, (tmp_path / "output").read_text()
    assert "not heard from rank 1" in events(folder, "failed")[0]["reason"]
    assert_undisturbed(task, folder, 2, 1e-5)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_stops_under_the_relaxed_timeout_is_noticed_by_its_silence(
    task: Path, tmp_path: Path, victim: int
) -> None:
    """Before the first step collectives may take an hour; still nobody waits longer than the timeout."""
    folder = tmp_path / "run"
    words = [*torchrun(2), FAULTY, str(task), "silence", str(victim), "1", f"run.dir={folder}", *SETTINGS]
    with started([*words, "run.timeout=5"], tmp_path / "output") as process:
        wait_until(lambda: (folder / "state.json").exists(), of=process)
        begun = time.monotonic()
        stopped = workers(process.pid)
        wait_until(lambda: state(folder)["state"] == "failed", seconds=60)
        assert time.monotonic() - begun < 30
        assert f"not heard from rank {victim}" in state(folder)["reason"]
        os.kill(stopped[victim], signal.SIGKILL)  # torchrun asks a stopped process in vain, for half a minute
        assert process.wait(60) == 1
    assert f"not heard from rank {victim}" in (tmp_path / "output").read_text()


def slowed(script: Path, seconds: float) -> Path:
    """The command in a hurry, ``seconds`` slower at each part of a checkpoint and each protocol of an evaluation."""
    script.write_text(
        "import time\n"
        "from partialfc.evaluate import runner as evaluation\n"
        "from partialfc.checkpoint import writer as saving\n"
        "write, score = saving._write_tensors, evaluation.score_pairs\n"
        f"saving._write_tensors = lambda *words: (time.sleep({seconds}), write(*words))\n"
        f"evaluation.score_pairs = lambda *words: (time.sleep({seconds}), score(*words))[1]\n"
        "from tests.harness.hurried import main\n"
        "main()\n"
    )
    return script


def test_the_state_is_fresh_in_a_long_save_and_in_a_long_evaluation(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = slowed(tmp_path / "slow.py", seconds=3)
    settings = ["evaluation.every=0", "optim.epochs=0.25", "optim.warmup=0.25", "checkpoint.asynchronous=false"]
    words = [sys.executable, str(script), "train", str(task), f"run.dir={folder}", *settings]
    seen: dict[str, set[float]] = {"save": set(), "evaluation": set()}
    with started(words, tmp_path / "output") as process:
        wait_until(lambda: steps_done(folder) == 3, of=process)
        while process.poll() is None:
            saved = (folder / "checkpoints" / "step-00000003").exists()
            found = state(folder)
            if found["state"] == "running":
                seen["evaluation" if saved else "save"].add(found["updated"])
            time.sleep(0.05)
        assert process.returncode == 0, (tmp_path / "output").read_text()
    assert len(seen["save"]) >= 3, seen
    assert len(seen["evaluation"]) >= 3, seen


@pytest.mark.parametrize("phase", [pytest.param("save", marks=pytest.mark.slow), "evaluation"])
def test_a_rank_that_stops_in_a_save_or_an_evaluation_is_noticed_by_its_silence(
    task: Path, tmp_path: Path, phase: str
) -> None:
    folder = tmp_path / "run"
    script = slowed(tmp_path / "slow.py", seconds=2)
    settings = [
        "evaluation.every=0",
        "optim.epochs=0.25",
        "optim.warmup=0.25",
        "checkpoint.asynchronous=false",
        "run.timeout=5",
    ]
    words = [*torchrun(2), str(script), "train", str(task), f"run.dir={folder}", *settings]
    begins = {"save": ".step-00000003.incomplete", "evaluation": "step-00000003"}[phase]
    with started(words, tmp_path / "output") as process:
        wait_until(lambda: (folder / "checkpoints" / begins).exists(), of=process)
        victim = workers(process.pid)[1]
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda: state(folder)["state"] == "failed", seconds=60)
        os.kill(victim, signal.SIGKILL)  # torchrun asks a stopped process in vain, for half a minute
        assert process.wait(60) == 1
    assert "not heard from rank 1" in state(folder)["reason"]
    assert state(folder)["step"] == 3


@pytest.mark.parametrize(
    ("victim", "asynchronous"),
    [
        (0, "true"),
        pytest.param(0, "false", marks=pytest.mark.slow),
        pytest.param(1, "true", marks=pytest.mark.slow),
        (1, "false"),
    ],
)
def test_a_rank_that_dies_in_the_last_save_is_named_also_if_it_is_the_first(
    task: Path, tmp_path: Path, victim: int, asynchronous: str
) -> None:
    folder = tmp_path / "run"
    slow = slowed(tmp_path / "slow.py", seconds=3)
    settings = [*SETTINGS, "optim.epochs=0.25", "optim.warmup=0.25", f"checkpoint.asynchronous={asynchronous}"]
    words = [*torchrun(2), str(slow), "train", str(task), f"run.dir={folder}", *settings]
    with started(words, tmp_path / "output") as process:
        wait_until(lambda: (folder / "checkpoints" / ".step-00000003.incomplete").exists(), of=process)
        time.sleep(0.5)
        os.kill(workers(process.pid)[victim], signal.SIGKILL)
        assert process.wait(60) == 1
    assert state(folder)["state"] == "failed"
    assert f"not heard from rank {victim}" in state(folder)["reason"]
    assert f"error: not heard from rank {victim}" in (tmp_path / "output").read_text()


def test_a_rank_that_dies_before_training_begins_is_named(task: Path, tmp_path: Path) -> None:
    folder, output, slow = tmp_path / "run", tmp_path / "output", tmp_path / "slow.py"
    slow.write_text(
        "import time\n"
        "from partialfc.checkpoint.manager import Checkpoints\n"
        "resume = Checkpoints.resume\n"
        "Checkpoints.resume = lambda self: (print('resumes', flush=True), time.sleep(3), resume(self))[2]\n"
        "from tests.harness.hurried import main\n"
        "main()\n"
    )
    words = [*torchrun(2), str(slow), "train", str(task), f"run.dir={folder}", *SETTINGS]
    with started(words, output) as process:
        wait_until(lambda: output.read_text().count("resumes") == 2, of=process)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        assert process.wait(60) == 1
    assert "[rank 0] error: not heard from rank 1" in output.read_text()


def agents(task: Path, folder: Path, port: int, nodes: str) -> list[str]:
    options = ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    options += [
        "--rdzv-id",
        "lost-node",
        "--max-restarts",
        "3",
        "--rdzv-conf",
        "last_call_timeout=3,keep_alive_interval=1",
    ]
    return [*torchrun(1, *options), *TRAIN_HURRIED, str(task), f"run.dir={folder}", *SETTINGS, "run.timeout=10"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_that_loses_a_node_for_good_continues_with_one_less(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = agents(task, folder, free_port(), "1:2")
    with started(words, tmp_path / "first") as first:
        time.sleep(1.0)  # it keeps the store, and so must be the one that stays
        with started(words, tmp_path / "second") as second:
            wait_until(lambda: (folder / "checkpoints" / "step-00000008").exists(), of=first)
            for pid in (second.pid, *children(second.pid)):
                os.kill(pid, signal.SIGKILL)
            assert first.wait(240) == 0, (tmp_path / "first").read_text()
    assert state(folder)["state"] == "finished"
    output = (tmp_path / "first").read_text()
    assert f"{STEPS} steps of 20 images over 2 ranks" in output
    assert "written on 2 ranks" in output
    assert f"{STEPS} steps of 20 images over 1 ranks" in output
    assert_undisturbed(task, folder, 2, 2e-2)  # another world size rounds otherwise, too


def test_restarts_that_get_no_further_are_given_up(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [
        *torchrun(1, "--max-restarts", "9"),
        FAULTY,
        str(task),
        "gradient",
        "0",
        "6-",
        f"run.dir={folder}",
        *SETTINGS,
    ]
    done = finish([*words, "run.skipped_in_a_row=1", "run.restarts_without_progress=1"], seconds=240)
    assert done.returncode == 1
    found = state(folder)
    assert found["state"] == "failed"
    assert "2 restarts in a row made no progress beyond step 4" in found["reason"]
    assert "steps in a row were skipped" in found["reason"], "and why the last one failed"
    assert found["reason"].count("giving up") == 1, "however often torchrun starts it again"
    assert [line["step"] for line in events(folder, "started")] == [0, 4, 4], "one more is allowed, no third"
    by_hand = run(task, 0, f"run.dir={folder}", *SETTINGS, "optim.epochs=1", "--force")
    assert by_hand.returncode == 0, by_hand.stderr
    assert state(folder)["state"] == "finished"


def test_only_automatic_restarts_without_progress_count(task: Path, tmp_path: Path) -> None:
    config = load_config(task, [f"run.dir={tmp_path}", "run.restarts_without_progress=2"])
    assert count_restarts(config, 0, automatic=1) == 0, "nothing was there before"
    before = {"state": "failed", "start_step": 8, "restarts": 2, "reason": "because"}
    (tmp_path / "state.json").write_text(json.dumps(before))
    assert count_restarts(config, 9, automatic=5) == 0, "it got further"
    assert count_restarts(config, 8, automatic=0) == 0, "a person has started it"
    with pytest.raises(GivenUp, match=r"3 restarts in a row made no progress beyond step 8.*because"):
        count_restarts(config, 8, automatic=1)
    (tmp_path / "state.json").write_text(json.dumps(before | {"restarts": 1}))
    assert count_restarts(config, 8, automatic=1) == 2
    (tmp_path / "state.json").write_text(json.dumps(before | {"reason": "3 restarts …", "given_up": True}))
    with pytest.raises(GivenUp, match=r"^3 restarts …$"):
        count_restarts(config, 8, automatic=1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_rounds_of_start_kill_and_resume_lose_no_sample(tmp_path: Path) -> None:
    tree = write_task(tmp_path)
    tree["evaluation"] = {"sets": [], "every": 0}
    tree["optim"] |= {"epochs": 200, "lr": 0.01}
    tree["checkpoint"] = {"every": 2}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    folder, rng = tmp_path / "run", random.Random(3)
    for _ in range(100):
        with started(command(config, 0), None) as process:
            before = steps_done(folder)
            wait_until(lambda before=before, process=process: steps_done(folder) > before or process.poll() is not None)
            time.sleep(rng.random())
    seen = lines(folder, "train")
    assert [line["step"] for line in seen] == list(range(1, len(seen) + 1))
    epochs = [divmod(line["step"] - 1, 12) for line in seen]
    expected = [222 * epoch + min(20 * (batch + 1), 222) for epoch, batch in epochs]
    assert [line["samples"] for line in seen] == expected
    assert len(events(folder, "started")) == 100
    end = finish([sys.executable, *TRAIN, str(config), f"optim.epochs={len(seen) // 12 + 1}", "--force"], seconds=300)
    assert end.returncode == 0, end.stdout + end.stderr


LONGER = ["optim.epochs=20", "optim.lr=0.001"]  # a host takes some seconds to join


def hosts(task: Path, folder: Path, nodes: str, *more: str) -> list[str]:
    """Command of each of several hosts, the same on all."""
    variables = {"NPROC": 1, "NNODES": nodes, "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}"}
    variables |= {"PYTHON": sys.executable, "RDZV_CONF": "last_call_timeout=3,keep_alive_interval=1"}
    words = ["env", *(f"{name}={value}" for name, value in variables.items()), str(TORCHRUN_SH)]
    overridden = {setting.partition("=")[0] for setting in more}
    settings = [setting for setting in SETTINGS if setting.partition("=")[0] not in overridden]
    return [*words, str(task), f"run.dir={folder}", *settings, *more, "run.timeout=30"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_host_that_joins_shares_the_rest_of_the_run(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = hosts(task, folder, "1:2", *LONGER)
    with started(words, tmp_path / "first") as first:
        wait_until(lambda: steps_done(folder) >= 5, of=first)
        with started(words, tmp_path / "second") as second:
            assert first.wait(240) == 0, (tmp_path / "first").read_text()
            assert second.wait(60) == 0, (tmp_path / "second").read_text()
    assert state(folder)["state"] == "finished"
    output = (tmp_path / "first").read_text() + (tmp_path / "second").read_text()
    assert "240 steps of 20 images over 1 ranks" in output
    assert "240 steps of 20 images over 2 ranks" in output
    assert_undisturbed(task, folder, 2, 2e-2, *LONGER)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_host_that_has_died_may_be_started_again(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = hosts(task, folder, "2")
    with started(words, tmp_path / "first") as first:
        time.sleep(2.0)  # it keeps the launchers' store, and so must be the one that stays
        with started(words, tmp_path / "second") as second:
            wait_until(lambda: (folder / "checkpoints" / "step-00000008").exists(), of=first)
            for pid in (second.pid, *children(second.pid)):
                os.kill(pid, signal.SIGKILL)
        with started(words, tmp_path / "third") as third:
            assert first.wait(240) == 0, (tmp_path / "first").read_text()
            assert third.wait(60) == 0, (tmp_path / "third").read_text()
    assert state(folder)["state"] == "finished"
    assert [line["step"] for line in events(folder, "started")][-1] >= 8
    assert_undisturbed(task, folder, 2, 1e-5)
