"""Deterministic algorithms, chosen for a run and given up after it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from partialfc.runtime.algorithms import algorithms
from tests.harness.running import lines, run


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_choice_holds_inside_the_context_only(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def fail_inside() -> None:
        with algorithms(deterministic):
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert torch.backends.cudnn.benchmark != deterministic
            assert torch.backends.cudnn.deterministic == deterministic
            assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


def test_a_run_with_deterministic_algorithms_has_no_operation_without_one(short_task: Path, tmp_path: Path) -> None:
    losses = []
    for name in ("one", "two"):
        settings = [f"run.dir={tmp_path / name}", "run.deterministic=true", "optim.accumulation=2"]
        done = run(short_task, 2, *settings, "optim.unsampled_rows=decayed")
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in lines(tmp_path / name, "train")])
    assert losses[0] == losses[1]
