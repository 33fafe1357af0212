"""The engine of torch alone."""

from __future__ import annotations

import pytest
import torch

from partialfc.config import parse_config
from partialfc.engines.ddp import DdpEngine
from partialfc.runtime.process import ProcessContext
from partialfc.runtime.stopping import StopRequest


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
