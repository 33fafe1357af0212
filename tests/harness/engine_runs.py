"""Runs of both engines, trained by name, and their results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.machine import no_fp16
from tests.harness.running import finish, lines

FAULTY_RUN = str(Path(__file__).with_name("faulty_run.py"))
LINEAR = "tests.harness.backbones:linear"
STAGES = [0, 1, 2, 3]
SPLIT = [1, 2, 3]
TWELVE = ["optim.epochs=1"]  # 12 steps
NEEDS_FP16 = pytest.mark.skipif(no_fp16() is not None, reason=str(no_fp16()))


def zero(stage: int, *more: str) -> list[str]:
    return ["engine.name=deepspeed", f"engine.zero_stage={stage}", *more]


def train_all(task: Path, ranks: int, runs: dict[str, list[str]], fault: list[Any] | None = None) -> None:
    """Train runs of these names and overrides. A failed one leaves its output, and its tests fail."""
    for name, overrides in runs.items():
        words = [sys.executable, FAULTY_RUN, str(task), *map(str, fault or ("nothing", 0, "1"))]
        done = finish([*words, f"run.dir={task.parent / name}", *overrides], ranks=ranks)
        if done.returncode:
            (task.parent / f"{name}.failed").write_text(done.stdout + done.stderr)


def folder_of(task: Path, name: str) -> Path:
    """Return the folder of a finished run."""
    failed = task.parent / f"{name}.failed"
    if failed.exists():
        pytest.fail(f"the run {name} has failed:\n{failed.read_text()}")
    return task.parent / name


def curve(task: Path, name: str, key: str = "loss") -> list[float]:
    return [line[key] for line in lines(folder_of(task, name), "train")]


def of_ranks(task: Path, name: str, ranks: int = 2) -> list[dict[str, Any]]:
    return [json.loads((folder_of(task, name) / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def applied(losses: list[float]) -> list[float]:
    """Return the losses of the applied steps."""
    return [loss for loss in losses if loss is not None]
