"""Requests to stop: signals to one rank, to all, twice; the file; while saving, while evaluating, at the end."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from partialfc.runtime.stopping import StopRequest
from tests.harness.running import (
    TRAIN,
    TRAIN_HURRIED,
    Process,
    command,
    events,
    finish,
    lines,
    run,
    started,
    state,
    steps_done,
    torchrun,
    wait_until,
    workers,
)
from tests.harness.tasks import write_set, write_task

LONG = ["optim.epochs=1000", "evaluation.every=0", "checkpoint.every=7"]


def assert_stopped_well(folder: Path) -> int:
    """Return the step after which it stopped; check its checkpoint, and that nothing is half done."""
    step: int = state(folder)["step"]
    assert state(folder)["state"] == "preempted"
    assert (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    assert [line["step"] for line in lines(folder, "train")] == list(range(1, step + 1))
    assert not list((folder / "checkpoints").glob(".*")), "nothing half written"
    assert events(folder, "preempted")[-1]["step"] == step
    return step


@contextmanager
def training(task: Path, folder: Path, *options: str) -> Iterator[Process]:
    """A torchrun of two ranks that train, and would for long, once they have done some steps."""
    words = [*torchrun(2, *options), *TRAIN, str(task), f"run.dir={folder}", *LONG]
    with started(words, folder.with_suffix(".log")) as process:
        wait_until(lambda: steps_done(folder) >= 3, of=process)
        yield process


@pytest.mark.parametrize(
    ("number", "to", "times"),
    [
        (signal.SIGUSR1, [1], 1),
        (signal.SIGTERM, [0], 1),
        (signal.SIGTERM, [0, 1], 2),
        (signal.SIGUSR1, [0, 1], 2),
    ],
)
def test_a_signal_to_some_rank_stops_all_with_a_checkpoint_and_torchrun_does_not_restart(
    task: Path, tmp_path: Path, number: signal.Signals, to: list[int], times: int
) -> None:
    folder = tmp_path / "run"
    with training(task, folder, "--max-restarts", "3") as process:
        ranks = workers(process.pid)
        for _ in range(times):
            for rank in to:
                os.kill(ranks[rank], number)
            time.sleep(0.1)
        assert process.wait(60) == 0, "to torchrun this is success: it must not start the run again"
    assert_stopped_well(folder)
    assert number.name in state(folder)["reason"]
    assert len(events(folder, "started")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_is_sent_until_the_ranks_have_ended_is_one_request(
    task: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    with training(task, folder, "--max-restarts", "3") as process:
        ranks = workers(process.pid)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, number)
            time.sleep(0.005)
        assert process.poll() == 0, folder.with_suffix(".log").read_text()
    assert_stopped_well(folder)
    assert len(events(folder, "started")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_itself_stops_the_run_as_well(task: Path, tmp_path: Path, number: signal.Signals) -> None:
    """It forwards SIGTERM or SIGINT and returns 1; the outcome is in state.json."""
    folder = tmp_path / "run"
    with training(task, folder, "--max-restarts", "3") as process:
        process.send_signal(number)
        assert process.wait(60) == 1
    assert_stopped_well(folder)
    assert number.name in state(folder)["reason"]
    assert len(events(folder, "started")) == 1


def test_ranks_whose_torchrun_is_killed_by_sigusr1_do_not_stay_behind(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*torchrun(2), *TRAIN_HURRIED, str(task), f"run.dir={folder}", *LONG, "run.timeout=5"]
    with started(words, tmp_path / "output") as process:
        wait_until(lambda: steps_done(folder) >= 3, of=process)
        orphans = workers(process.pid)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == -signal.SIGUSR1
        try:
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), seconds=60)
        finally:
            for pid in orphans:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert state(folder)["state"] == "failed"
    assert "its launcher" in state(folder)["reason"]


def test_a_stopped_run_resumes_as_if_it_had_not_stopped(task: Path, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    settings = ["evaluation.every=0", "evaluation.sets=[]", "optim.epochs=4"]
    assert run(task, 2, f"run.dir={whole}", *settings).returncode == 0
    words = command(task, 2, f"run.dir={folder}", *settings)
    with started(words, tmp_path / "output") as process:
        wait_until(lambda: steps_done(folder) >= 3, of=process)
        (folder / "stop").touch()
        assert process.wait(60) == 0
    stopped_after = assert_stopped_well(folder)
    assert not (folder / "stop").exists(), "it has served; the next start trains"
    assert run(task, 2, f"run.dir={folder}", *settings).returncode == 0
    assert state(folder)["state"] == "finished"
    assert [line["step"] for line in events(folder, "started")] == [0, stopped_after]
    for mine, other in zip(lines(folder, "train"), lines(whole, "train"), strict=True):
        assert mine["step"] == other["step"]
        assert mine["samples"] == other["samples"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_single_process_stops_with_code_75_and_its_loader_processes_with_it(
    task: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    words = command(task, 0, f"run.dir={folder}", "data.workers=2", *LONG)
    output = tmp_path / "output"
    with started(words, output, start_new_session=True) as process:
        wait_until(lambda: steps_done(folder) >= 3, of=process)
        os.killpg(process.pid, number)  # as Slurm and a terminal do: the loader's processes get it too
        assert process.wait(60) == 75, output.read_text()
    assert_stopped_well(folder)
    assert "start again to resume" in output.read_text()


def test_a_request_in_the_last_step_is_honoured_before_the_evaluation(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "stop").touch()  # before the start: the first step is still done
    settings = [f"run.dir={folder}", "data.global_batch_size=1000", "optim.epochs=1"]
    first = finish(command(task, 0, *settings))
    assert first.returncode == 75, first.stdout + first.stderr
    assert assert_stopped_well(folder) == 1
    assert not lines(folder, "evaluation")
    second = finish(command(task, 0, *settings))
    assert second.returncode == 0, second.stdout + second.stderr
    assert state(folder)["state"] == "finished"
    assert [line["step"] for line in lines(folder, "evaluation")] == [1]


@pytest.mark.parametrize("when", ["in between", pytest.param("at the end", marks=pytest.mark.slow)])
def test_a_request_during_an_evaluation_is_not_kept_waiting_and_the_evaluation_is_made_up_for(
    tmp_path: Path, when: str
) -> None:
    tree = write_task(tmp_path)
    write_set(tmp_path / "large", 37, 100 if when == "in between" else 400, seed=5)  # takes seconds to embed
    tree["evaluation"] |= {"sets": [str(tmp_path / "large")], "every": 4, "batch_size": 4}
    tree["optim"] |= {"epochs": 1 if when == "in between" else 1 / 3, "warmup": 0.25}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    folder = tmp_path / "run"
    with started(command(config, 2), tmp_path / "output") as process:
        wait_until(lambda: steps_done(folder) >= 4, of=process)
        time.sleep(1.0)
        os.kill(workers(process.pid)[1], signal.SIGUSR1)
        assert process.wait(60) == 0
    assert not lines(folder, "evaluation"), "the request came during it"
    assert assert_stopped_well(folder) == 4
    assert run(config, 2).returncode == 0
    steps = [line["step"] for line in lines(folder, "evaluation")]
    assert steps == ([4, 8, 12] if when == "in between" else [4])


def test_a_request_while_a_checkpoint_is_being_written_waits_for_it(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    slow = (  # every part of a checkpoint takes a second longer
        "import sys, time\n"
        "from partialfc.checkpoint import writer as saving\n"
        "write = saving._write_tensors\n"
        "saving._write_tensors = lambda *words: (time.sleep(1), write(*words))\n"
        "from partialfc.__main__ import main\n"
        "sys.argv = ['partialfc', *sys.argv[1:]]\n"
        "main()\n"
    )
    words = [sys.executable, "-c", slow, "train", str(task), f"run.dir={folder}", *LONG, "checkpoint.every=5"]
    with started(words, tmp_path / "output") as process:
        wait_until(lambda: (folder / "checkpoints" / ".step-00000005.incomplete").exists(), of=process)
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGUSR1)
        assert process.wait(60) == 75
    stopped_after = assert_stopped_well(folder)
    kept = [line["step"] for line in events(folder, "checkpoint")]
    assert kept[0] == 5
    assert kept[-1] == stopped_after


def test_a_stop_file_that_cannot_be_removed_is_reported_and_the_run_still_stops(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "stop").mkdir(parents=True)
    done = finish(command(task, 0, f"run.dir={folder}", *LONG))
    assert done.returncode == 75, done.stdout + done.stderr
    assert assert_stopped_well(folder) == 1
    assert f"{folder / 'stop'} cannot be removed" in done.stdout


def test_a_look_for_the_stop_file_that_fails_is_no_request_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> bool:
        raise OSError(errno.ESTALE, "Stale file handle")

    stop = StopRequest(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "exists", stale)
        assert not stop.requested
    (tmp_path / "stop").touch()
    wait_until(lambda: stop.requested, seconds=10)


def test_a_request_that_comes_when_all_is_done_does_not_stop_the_next_start(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    late = (  # the file appears while the last checkpoint is being written
        "import pathlib, sys\n"
        "from partialfc.checkpoint import writer as saving\n"
        "write = saving._write_tensors\n"
        "stop = pathlib.Path(sys.argv.pop(1), 'stop')\n"
        "saving._write_tensors = lambda *words: (stop.touch(), write(*words))\n"
        "from partialfc.__main__ import main\n"
        "main()\n"
    )
    settings = [f"run.dir={folder}", "evaluation.sets=[]", "evaluation.every=0", "data.global_batch_size=1000"]
    first = finish([sys.executable, "-c", late, str(folder), "train", str(task), *settings, "optim.epochs=1"])
    assert first.returncode == 0, first.stdout + first.stderr
    assert state(folder)["state"] == "finished"
    second = finish([*command(task, 0, *settings, "optim.epochs=3"), "--force"])
    assert second.returncode == 0, second.stdout + second.stderr
    assert state(folder)["step"] == 3


def test_a_second_ctrl_c_ends_the_run_at_once_with_a_reason_and_its_checkpoints_so_far(
    task: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    slow = (
        "import time\n"
        "from partialfc.checkpoint import writer as saving\n"
        "write = saving._write_tensors\n"
        "saving._write_tensors = lambda folder, *words: (\n"
        "    time.sleep(0 if 'step-00000003' in folder.name else 30), write(folder, *words)\n"
        ")\n"
        "from partialfc.__main__ import main\n"
        "main()\n"
    )
    settings = [*LONG, "checkpoint.every=3", "data.workers=2"]
    words = [sys.executable, "-c", slow, "train", str(task), f"run.dir={folder}", *settings]
    with started(words, tmp_path / "output") as process:
        wait_until(lambda: (folder / "checkpoints" / ".step-00000006.incomplete").exists(), of=process)
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        assert process.wait(4) == 1
    assert "second Ctrl-C" in state(folder)["reason"]
    assert "error: a second Ctrl-C ended the run" in (tmp_path / "output").read_text().splitlines()[-1]
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000003"]
    again = finish(command(task, 0, f"run.dir={folder}", *settings, "optim.epochs=0.5"))
    assert again.returncode == 2, "another config"
    again = finish([*command(task, 0, f"run.dir={folder}", *settings, "optim.epochs=0.5"), "--force"])
    assert again.returncode == 0, again.stdout + again.stderr
    assert state(folder)["start_step"] == 3
