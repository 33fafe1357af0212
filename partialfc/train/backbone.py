"""The backbone of a run: built, placed, given its first weights and an optimizer."""

from __future__ import annotations

import os
import shutil
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from partialfc import models
from partialfc.config import Config
from partialfc.errors import ConfigError, MissingDependency
from partialfc.models.weights import load_backbone
from partialfc.tracking.progress import log
from partialfc.train.agreement import is_first, on_first
from partialfc.train.checkpoint_files import step_folders
from partialfc.train.ranks import Rank

Switch = Literal[True, False, "auto"]


def build_backbone(config: Config, rank: Rank) -> nn.Module:
    """The module whose tensors are trained, saved and exported, on this rank's device.

    Raises:
        ConfigError: the config asks for a backbone that there is not, or for what this device cannot do.
        MissingDependency: it needs a package that is not installed.
    """
    model = config.model
    backbone = models.build(
        model.name,
        model.embedding_dim,
        config.data.channels,
        config.data.image_size,
        model.options,
        model.activation_checkpointing,
    )
    if synchronizes(config.engine.sync_batchnorm, rank.device.type, rank.world_size):
        backbone = synchronized(backbone)
    backbone = backbone.to(rank.device)
    if _on(model.channels_last, rank.device.type):
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    return backbone


def build_backbone_optimizer(config: Config, backbone: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The backbone's optimizer, at the peak learning rate; on a GPU one kernel updates all tensors."""
    optim = config.optim
    common: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    if device.type == "cuda":
        common["fused"] = True
    if optim.name == "adamw":
        return torch.optim.AdamW(backbone.parameters(), **common)
    return torch.optim.SGD(backbone.parameters(), momentum=optim.momentum, **common)


def start_pretrained(config: Config, backbone: nn.Module) -> None:
    """Fill the backbone of a run that begins from ``model.pretrained``, if it is given. A collective; the first rank
    reads the file.

    Raises:
        ConfigError: the weights are not of this backbone.
        DataError: the file cannot be read, or holds NaN.
    """
    path = config.model.pretrained
    if path is None:
        return
    if is_continued(config):
        if is_first():
            log(f"model.pretrained={path} is not read: the run goes on from its own checkpoint")
        return
    on_first(lambda: load_backbone(backbone, path))
    if dist.is_initialized():
        for value in backbone.state_dict().values():
            dist.broadcast(value, src=0)
    if is_first():
        log(f"the backbone starts from {path}")


def is_continued(config: Config) -> bool:
    """Whether the run folder holds checkpoints to go on from. A collective."""
    wanted = config.checkpoint.resume != "never"
    return wanted and on_first(lambda: bool(step_folders(config.run.dir / "checkpoints")))


def synchronizes(switch: Switch, device_type: str, world_size: int) -> bool:
    """Whether batch normalisation uses the statistics of all ranks' images.

    Raises:
        ConfigError: it is asked for on a CPU.
    """
    if switch is True and device_type != "cuda":
        raise ConfigError(
            f"engine.sync_batchnorm: torch has SyncBatchNorm on GPUs only, and this run is on {device_type}; set it to "
            "auto or false"
        )
    return world_size > 1 and _on(switch, device_type)


def synchronized(backbone: nn.Module) -> nn.Module:
    """``backbone`` with every batch normalisation synchronised; its tensors and their names stay."""
    if any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    return backbone


def _on(switch: Switch, device_type: str) -> bool:
    return device_type == "cuda" if switch == "auto" else switch


def require_compiler(device_type: str) -> None:
    """Say so now, not in the first step."""
    name = os.environ.get("CXX") or "g++"
    if device_type == "cpu" and shutil.which(name) is None:
        raise MissingDependency(
            f"engine.compile needs a C++ compiler on a CPU, and {name} is not installed: apt-get install g++, or set "
            "engine.compile=false"
        )
