"""The summary of a run, and the evaluations that it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from partialfc.runs.summary import summarize

TRAIN = {"kind": "train", "loss": 1.5, "target_cosine": 0.6}
RESULTS = {"known": {"accuracy": 1.0, "samples": 74}, "plain": {"tar_at_far": {"0.001": 0.5}}}


def summary(folder: Path, *lines: dict[str, Any]) -> list[str]:
    end = {"kind": "event", "event": "finished", "step": 376, "samples_per_s": 100.0, "training_seconds": 60.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*lines, end)))
    return summarize(folder).splitlines()


def test_an_evaluation_of_another_step_says_so(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    for name in ("step-00000276", "step-00000376-other-0a1b2c3d"):
        (tmp_path / "evaluation" / f"roc-{name}.png").touch()
    at_276 = {"kind": "evaluation", "step": 276, "results": RESULTS}
    found = [line for line in summary(tmp_path, at_276, TRAIN | {"step": 376}) if "known" in line or "plain" in line]
    assert len(found) == 2
    assert all(line.endswith("(at step 276)") for line in found)
    (roc,) = [line for line in summary(tmp_path, at_276, TRAIN | {"step": 376}) if "ROC" in line]
    assert roc.endswith("roc-step-00000276.png  (at step 276)")


def test_an_evaluation_of_the_last_step_is_shown_without_it(tmp_path: Path) -> None:
    text = "\n".join(summary(tmp_path, TRAIN | {"step": 376}, {"kind": "evaluation", "step": 376, "results": RESULTS}))
    assert "known: accuracy" in text
    assert "at step" not in text
    assert "ROC" not in text


def test_a_run_without_evaluations_has_a_summary(tmp_path: Path) -> None:
    assert not [line for line in summary(tmp_path, TRAIN | {"step": 376}) if "accuracy" in line or "ROC" in line]
