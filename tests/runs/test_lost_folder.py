"""A run folder that is removed or renamed while the run trains: a plain error, and nothing lost that can be kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from partialfc.tracking.metrics import MetricsFile, read_metrics
from tests.harness.running import TRAIN_HURRIED, Process, events, ranks_of, run, state, steps_done, wait_until

LONG = ["optim.epochs=1000", "evaluation.every=0", "evaluation.sets=[]"]


def disturbed(task: Path, folder: Path, ranks: int, disturb: Callable[[], object]) -> tuple[list[int], str]:
    """Exit codes and output of a run whose folder is disturbed after some steps."""
    output = folder.parent / "output"
    words = [sys.executable, *TRAIN_HURRIED, str(task), f"run.dir={folder}", *LONG]
    processes: list[Process]
    with output.open("w") as file, ranks_of(words, ranks, stdout=file, stderr=subprocess.STDOUT) as processes:
        wait_until(lambda: steps_done(folder) >= 3, of=processes[0])
        disturb()
        codes = [process.wait(60) for process in processes]
    assert "Traceback" not in output.read_text()
    return codes, output.read_text()


def remove(folder: Path) -> None:
    while folder.exists():  # the run may write a file while its folder is being removed
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_folder_that_is_removed_ends_the_run_with_one_line_and_its_metrics_beside(
    task: Path, tmp_path: Path, ranks: int
) -> None:
    folder = tmp_path / "run"
    codes, output = disturbed(task, folder, ranks, lambda: remove(folder))
    assert set(codes) == {2}, output
    errors = [line for line in output.splitlines() if "error: " in line]
    assert len(errors) == max(ranks, 1)
    assert all(f"run.dir: {folder} has been removed while the run trained" in line for line in errors)
    kept = read_metrics(tmp_path / "run.metrics.jsonl")
    assert [line["step"] for line in kept if line["kind"] == "train"][:3] == [1, 2, 3]
    assert kept[-1]["event"] == "failed"
    assert not folder.exists(), "nothing has made it again"
    again = run(task, 0, f"run.dir={folder}", "optim.epochs=0.5", "evaluation.sets=[]")
    assert again.returncode == 0, again.stderr


def test_a_folder_that_is_renamed_ends_the_run_and_goes_on_under_its_old_name(task: Path, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    codes, output = disturbed(task, folder, 0, lambda: folder.rename(elsewhere))
    assert codes == [2], output
    assert f"run.dir: {folder} has become {elsewhere} while the run trained" in output
    assert state(elsewhere)["state"] == "failed"
    assert "has become" in state(elsewhere)["reason"]
    assert events(elsewhere, "failed")
    assert not (tmp_path / "run.metrics.jsonl").exists(), "its metrics have gone with it"
    elsewhere.rename(folder)
    (folder / "stop").touch()
    again = run(task, 0, f"run.dir={folder}", *LONG)
    assert again.returncode == 75, again.stderr


def test_a_folder_in_whose_place_another_one_lies_is_left_alone(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def replace() -> None:
        folder.rename(tmp_path / "old")
        folder.mkdir()
        (folder / "state.json").write_text('{"state": "running", "step": 7}')

    codes, output = disturbed(task, folder, 0, replace)
    assert codes == [2], output
    assert json.loads((folder / "state.json").read_text()) == {"state": "running", "step": 7}


def test_rescued_metrics_overwrite_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    metrics = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    metrics.write("train", step=1)
    assert metrics.rescue(tmp_path / "kept.jsonl") is None, "they are where they belong"
    shutil.rmtree(tmp_path / "run")
    metrics.write("train", step=2)
    (tmp_path / "kept.jsonl").write_text("mine")
    assert metrics.rescue(tmp_path / "kept.jsonl") == tmp_path / "kept-2.jsonl"
    assert [line["step"] for line in read_metrics(tmp_path / "kept-2.jsonl")] == [1, 2]
    assert (tmp_path / "kept.jsonl").read_text() == "mine"
    assert metrics.rescue(tmp_path / "nowhere" / "kept.jsonl") is None
    metrics.close()
