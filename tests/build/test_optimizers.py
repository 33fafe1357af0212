"""The backbone's optimizer, as the config asks for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from partialfc.build.optimizers import build_backbone_optimizer
from partialfc.config import parse_config
from partialfc.engines.state import device_of_state


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers_are_fused_on_gpus(name: str) -> None:
    def build(device: str) -> torch.optim.Optimizer:
        settings = parse_config(
            {"data": {"train": "x"}, "optim": {"name": name, "lr": 0.3, "momentum": 0.8, "weight_decay": 0.1}}
        )
        return build_backbone_optimizer(settings, nn.Linear(3, 2), torch.device(device))

    on_cpu, on_gpu = build("cpu"), build("cuda")
    assert type(on_cpu) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    assert not on_cpu.defaults["fused"]
    assert on_gpu.defaults["fused"]
    assert (on_gpu.defaults["lr"], on_gpu.defaults["weight_decay"]) == (0.3, 0.1)
    if name == "sgd":
        assert on_gpu.defaults["momentum"] == 0.8
    # A checkpoint's state goes where the optimizer looks for it: a fused one counts its steps on the GPU.
    parameter = torch.empty(1, device="meta")
    assert device_of_state(on_cpu, parameter, "step").type == "cpu"
    assert device_of_state(on_gpu, parameter, "step").type == "meta"
    assert device_of_state(on_cpu, parameter, "momentum_buffer").type == "meta"
