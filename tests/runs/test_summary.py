"""The summary of a finished run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from partialfc.runs.summary import summarize
from tests.harness.running import finish, lines, run
from tests.harness.tasks import write_task

FAULTY = str(Path(__file__).parents[1] / "harness" / "faulty_run.py")


def write_metrics(folder: Path, *values: object) -> None:
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in values))


def loss_of(folder: Path) -> str:
    (row,) = [line for line in summarize(folder).splitlines() if line.startswith("  loss ")]
    return row.removeprefix("  loss").strip()


def test_a_run_whose_last_steps_were_all_skipped_finishes_and_stays_finished(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))
    folder = tmp_path / "run"
    quick = ["evaluation.every=0", "evaluation.sets=[]", "optim.epochs=1", "tracking.log_every=4"]  # 12 steps
    words = [sys.executable, FAULTY, str(config), "gradient", "0", "9,10,11,12", f"run.dir={folder}", *quick]
    done = finish(words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(folder, "train")[-1]["loss"] is None
    again = run(config, 0, f"run.dir={folder}", *quick)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "this run is already finished" in again.stdout
    assert "(mean up to step 8, target cosine " in again.stdout
    assert "; all later steps were skipped)" in again.stdout


def test_the_loss_is_that_of_the_newest_applied_steps(tmp_path: Path) -> None:
    first = {"kind": "train", "step": 4, "loss": 1.5, "target_cosine": 0.25}
    skipped = {"kind": "train", "step": 8, "loss": None, "target_cosine": None}
    write_metrics(tmp_path, first)
    assert loss_of(tmp_path) == "1.5000  (mean over the last steps, target cosine 0.250)"
    write_metrics(tmp_path, first, skipped, skipped)
    assert loss_of(tmp_path) == "1.5000  (mean up to step 4, target cosine 0.250; all later steps were skipped)"
    write_metrics(tmp_path, skipped)
    assert loss_of(tmp_path) == "none  (all steps were skipped)"


@pytest.mark.parametrize("odd", [3, [], None, {}, {"kind": 1}, "text"])
def test_odd_lines_are_passed_over(tmp_path: Path, odd: object) -> None:
    write_metrics(tmp_path, {"kind": "train", "step": 4, "loss": 1.5, "target_cosine": 0.25}, odd)
    assert loss_of(tmp_path).startswith("1.5000 ")


def test_names_of_results_are_not_obeyed_by_the_terminal(tmp_path: Path) -> None:
    results = {"\x1b[2Jset": {"accuracy": 0.5, "samples": 8}}
    write_metrics(tmp_path, {"kind": "evaluation", "step": 4, "results": results})
    text = summarize(tmp_path)
    assert "\x1b" not in text
    assert r"\x1b[2Jset: accuracy" in text
