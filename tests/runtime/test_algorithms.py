"""Deterministic algorithms, chosen for a run and given up after it."""

from __future__ import annotations

import os

import pytest
import torch

from partialfc.runtime.algorithms import algorithms


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
