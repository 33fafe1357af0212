"""Small training states and their checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from partialfc import CenterLoss, PartialFC, RowSGD, losses
from partialfc.checkpoint.state import TrainingState
from partialfc.engines.state import ReplicatedBackbone
from partialfc.exchange.merge import merge


def made(kind: Any = RowSGD, start: int = 0, classes: int = 11, **options: Any) -> TrainingState:
    """A small network and head; ``start`` varies the initial weights, not the negatives."""
    torch.manual_seed(start)
    backbone = torch.nn.Linear(6, 8)
    head = PartialFC(classes, 8, losses.AdaFace(16.0), **{"sample_rate": 0.5, "center_loss": CenterLoss(0.1)} | options)
    with torch.no_grad():
        head.weight.add_(start)
    return TrainingState(
        ReplicatedBackbone(backbone, torch.optim.Adam(backbone.parameters())), head, kind(head.parameters())
    )


def train_a_little(state: TrainingState, steps: int = 3) -> list[float]:
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step + 50)
        x, y = (
            torch.randn(7, 6, generator=generator),
            torch.randint(0, state.head.num_classes, (7,), generator=generator),
        )
        world_size, rank = state.head.collectives.world_size, state.head.collectives.rank
        out = state.head(state.backbone.module(x.tensor_split(world_size)[rank]), y.tensor_split(world_size)[rank])
        out.loss.backward()
        for parameter in state.backbone.module.parameters():
            state.head.collectives.sum(parameter.grad).div_(world_size)
        for optimizer in (state.backbone.optimizer, state.head_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        found.append(float(out.loss.detach()))
    return found


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return the backbone of a run's newest checkpoint."""
    path = folder / "all.safetensors"
    path.unlink(missing_ok=True)
    merge(folder, path, only="backbone.")
    return {name.removeprefix("backbone."): value for name, value in load_file(path).items()}
