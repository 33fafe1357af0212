"""The two optimizers of a run: one for the backbone, one for the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from partialfc.config import Config
from partialfc.head import PartialFC, RowAdagrad, RowAdamW, RowSGD
from partialfc.head.optim.base import RowOptimizer


def build_backbone_optimizer(config: Config, backbone: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Build the backbone's optimizer at the peak learning rate; on a GPU, a fused kernel updates all tensors."""
    optim = config.optim
    common: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    if device.type == "cuda":
        common["fused"] = True
    if optim.name == "adamw":
        return torch.optim.AdamW(backbone.parameters(), **common)
    return torch.optim.SGD(backbone.parameters(), momentum=optim.momentum, **common)


def build_head_optimizer(config: Config, head: PartialFC) -> RowOptimizer:
    """Build the head's optimizer at the peak learning rate; each group keeps its multiple of it as ``lr_factor``."""
    optim = config.optim
    rows = [parameter for parameter in (head.weight, head.bias) if parameter is not None]
    groups: list[dict[str, Any]] = [{"params": rows, "lr_factor": optim.head_lr_factor}]
    # A scalar that a loss learns (UCE's threshold) is not a row: it gets neither decay nor the rows' learning rate.
    loss_parameters = list(head.loss.parameters())
    if loss_parameters:
        groups.append({"params": loss_parameters, "lr_factor": 1.0, "weight_decay": 0.0})
    state_dtype = torch.bfloat16 if optim.head_state_dtype == "bfloat16" else torch.float32
    common: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    if optim.head_optimizer == "adamw":
        return RowAdamW(groups, **common, state_dtype=state_dtype)
    if optim.head_optimizer == "adagrad":
        return RowAdagrad(groups, **common)
    return RowSGD(
        groups, **common, momentum=optim.momentum, unsampled_rows=optim.unsampled_rows, state_dtype=state_dtype
    )
