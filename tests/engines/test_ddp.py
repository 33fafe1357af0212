"""The plain torch engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from partialfc.config import parse_config
from partialfc.engines.ddp import DdpEngine
from partialfc.runtime.process import ProcessContext
from partialfc.runtime.stopping import StopRequest
from tests.harness.running import run


def test_an_exception_does_not_leave_evaluation_mode_or_autocast_behind() -> None:
    backbone = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout())
    config = parse_config({"data": {"train": "x"}, "engine": {"precision": "bf16"}})
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    engine = DdpEngine(backbone, optimizer, config, ProcessContext(0, 1, torch.device("cpu"), StopRequest(None)))

    def evaluate_in_vain() -> None:
        with engine.evaluating() as module:
            assert not any(part.training for part in module.modules())
            assert torch.is_autocast_enabled("cpu")
            raise KeyError("while evaluating")

    with pytest.raises(KeyError):
        evaluate_in_vain()
    assert backbone.training
    assert backbone[1].training
    assert not torch.is_autocast_enabled("cpu")


def test_unused_and_frozen_parameters_are_named(short_task: Path, tmp_path: Path) -> None:
    folder = f"run.dir={tmp_path / 'run'}"
    unused = run(short_task, 2, "model.name=tests.harness.backbones:unused_first", folder)
    assert unused.returncode == 1
    assert "the forward pass does not use 1 trainable parameters" in unused.stderr
    assert "to average over ranks: first. Remove them, or freeze them" in unused.stderr
    assert run(short_task, 0, "model.name=tests.harness.backbones:unused_first", folder, "--force").returncode == 0
    frozen = run(short_task, 0, "model.name=tests.harness.backbones:frozen", f"run.dir={tmp_path / 'frozen'}")
    assert frozen.returncode == 2
    assert "backbones:frozen has no trainable parameter" in frozen.stderr
