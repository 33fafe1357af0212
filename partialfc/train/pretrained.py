"""Weights from which the backbone of a new run starts."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from partialfc.checkpoint.folders import step_folders
from partialfc.config import Config
from partialfc.models.weights import load_backbone
from partialfc.runtime.collectives import broadcast_from_rank0, is_rank0
from partialfc.tracking.console import log


def start_pretrained(config: Config, backbone: nn.Module) -> None:
    """Load ``model.pretrained``, if given, into the backbone of a new run. A collective; rank 0 reads the file.

    Raises:
        ConfigError: the weights do not fit this backbone.
        DataError: the file cannot be read, or holds NaN.
    """
    path = config.model.pretrained
    if path is None:
        return
    if will_resume(config):
        if is_rank0():
            log(f"model.pretrained={path} is not read: the run resumes from its own checkpoint")
        return
    left_out = broadcast_from_rank0(lambda: load_backbone(backbone, path))
    if dist.is_initialized():
        for value in backbone.state_dict().values():
            dist.broadcast(value, src=0)
    if is_rank0():
        without = f" without {', '.join(left_out)}: the backbone has no classifier" if left_out else ""
        log(f"the backbone starts from {path}{without}")


def will_resume(config: Config) -> bool:
    """Return True if the run folder holds checkpoints to resume from. A collective."""
    wanted = config.checkpoint.resume != "never"
    return wanted and broadcast_from_rank0(lambda: bool(step_folders(config.run.dir / "checkpoints")))
