"""Checkpoints: torch DCP, everything per class as a ``Shard(0)`` DTensor, beside a manifest of sizes and digests.

A checkpoint folder is complete or absent: it is written under a temporary name, synced, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from partialfc.head import PartialFC

FORMAT = 1


def checkpoint_tensors(
    backbone: nn.Module, head: PartialFC, backbone_optimizer: Optimizer, head_optimizer: Optimizer
) -> dict[str, Tensor]:
    """All tensors of a run by name: replicated ones as they are, one row a class as DTensors over the ranks."""
    tensors: dict[str, Tensor] = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    for name, parameter in backbone.named_parameters():
        for key, value in backbone_optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"backbone_optimizer.{name}.{key}"] = value
    per_class = {"weight", "bias", "center_loss.centers"}
    for name, value in head.state_dict().items():
        tensors[f"head.{name}"] = _sharded(head, value) if name in per_class else value
    for name, parameter in head.named_parameters():
        for key, value in head_optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                rows = name in per_class and value.dim() > 0  # the optimizer's own step count is no row
                tensors[f"head.optimizer.{name}.{key}"] = _sharded(head, value) if rows else value
    return tensors


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """Write ``folder``. A collective: every rank calls it. ``manifest`` is the first rank's."""
    distributed = dist.is_initialized()
    first = not distributed or dist.get_rank() == 0
    temporary = folder.with_name(f".{folder.name}.incomplete")
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    if distributed:
        dist.barrier()
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True), no_dist=not distributed)
    files = _describe_all(temporary)
    if first:
        manifest = {"format": FORMAT, **manifest, "files": files, "torch": torch.__version__}
        path = temporary / "manifest.json"
        path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(path)
        _sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        _sync(folder.parent)
    if distributed:
        dist.barrier()


def _sharded(head: PartialFC, local: Tensor) -> Tensor:
    """``local``, this rank's rows, as its part of the tensor of all classes."""
    if not head.collectives.distributed:
        return local
    mesh = DeviceMesh(local.device.type, torch.arange(head.collectives.world_size))
    shape = torch.Size((head.num_classes, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _describe_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Sizes and digests of all files of ``folder``; the ranks share the reading. A collective."""
    paths = sorted(folder.iterdir())
    if not dist.is_initialized():
        return {path.name: _describe(path) for path in paths}
    mine = {path.name: _describe(path) for path in paths[dist.get_rank() :: dist.get_world_size()]}
    parts: list[dict[str, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return dict(sorted((name, file) for part in parts for name, file in part.items()))


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
