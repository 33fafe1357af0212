"""Checkpoints: torch DCP, everything per class as a ``Shard(0)`` DTensor, beside a manifest of sizes and digests.

A checkpoint folder is complete or absent: it is written under a temporary name, synced, and renamed. It loads on any
number of ranks: each takes its own range of the classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from partialfc.errors import CheckpointFailed, ConfigError
from partialfc.head import PartialFC
from partialfc.tracking.progress import log
from partialfc.train.checkpoint_files import (
    FORMAT,
    MANIFEST,
    CheckedReader,
    DamagedCheckpoint,
    check_file,
    read_manifest,
    step_folders,
)

_PER_CLASS = {"weight", "bias", "center_loss.centers"}
_BACKBONE_OPTIMIZER, _HEAD_OPTIMIZER = "backbone_optimizer.", "head.optimizer."


class TrainingState:
    """Everything of a run that is tensors, by the names that checkpoints use.

    Replicated tensors are saved as they are; those with one row a class as DTensors over the ranks.
    """

    def __init__(
        self, backbone: nn.Module, head: PartialFC, backbone_optimizer: Optimizer, head_optimizer: Optimizer
    ) -> None:
        self.backbone, self.head = backbone, head
        self.backbone_optimizer, self.head_optimizer = backbone_optimizer, head_optimizer

    def tensors(self) -> dict[str, Tensor]:
        """All of them, as they lie."""
        found = self._of_modules()
        for name, parameter in self.backbone.named_parameters():
            for key, value in self.backbone_optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{_BACKBONE_OPTIMIZER}{name}.{key}"] = value
        for name, parameter in self.head.named_parameters():
            for key, value in self.head_optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    rows = name in _PER_CLASS and value.dim() > 0  # the optimizer's own step count is no row
                    found[f"{_HEAD_OPTIMIZER}{name}.{key}"] = _sharded(self.head, value) if rows else value
        return found

    def _of_modules(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {f"backbone.{name}": value for name, value in self.backbone.state_dict().items()}
        for name, value in self.head.state_dict().items():
            found[f"head.{name}"] = _sharded(self.head, value) if name in _PER_CLASS else value
        return found

    def load(self, checkpoint: Path) -> None:
        """Take everything from a checkpoint folder that has been checked. A collective.

        Raises:
            ConfigError: it is of another model, head or number of classes.
            DamagedCheckpoint: it cannot be read.
        """
        reader = CheckedReader(checkpoint)
        stored = reader.read_metadata().state_dict_metadata
        targets = self._of_modules()
        _check_shapes(checkpoint, targets, stored)
        states: list[tuple[Optimizer, nn.Parameter, str, str]] = []
        for prefix, optimizer, module in (
            (_BACKBONE_OPTIMIZER, self.backbone_optimizer, self.backbone),
            (_HEAD_OPTIMIZER, self.head_optimizer, self.head),
        ):
            parameters = dict(module.named_parameters())
            for name, entry in stored.items():
                if not name.startswith(prefix) or not isinstance(entry, TensorStorageMetadata):
                    continue
                owner, _, key = name.removeprefix(prefix).rpartition(".")
                if owner not in parameters:
                    raise ConfigError(f"{checkpoint} holds optimizer state of {owner!r}, which this run does not have")
                parameter = parameters[owner]
                rows = module is self.head and owner in _PER_CLASS and len(entry.size) > 0
                shape = (len(parameter), *entry.size[1:]) if rows else entry.size
                device = parameter.device if key != "step" else torch.device("cpu")
                value = torch.zeros(shape, dtype=entry.properties.dtype, device=device)
                targets[name] = _sharded(self.head, value) if rows else value
                states.append((optimizer, parameter, key, name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about loading in a single process, which is meant
            dcp.load(targets, storage_reader=reader, no_dist=not dist.is_initialized())
        for optimizer, parameter, key, name in states:
            value = targets[name]
            optimizer.state[parameter][key] = value.to_local() if isinstance(value, DTensor) else value
        self.head.forget_step()


def _check_shapes(checkpoint: Path, targets: dict[str, Tensor], stored: dict[str, Any]) -> None:
    missing = [name for name in targets if name not in stored]
    ours = (*targets, _BACKBONE_OPTIMIZER, _HEAD_OPTIMIZER)
    foreign = [name for name in stored if name not in targets and not name.startswith(ours[-2:])]
    if missing or foreign:
        words = f"lacks {missing[0]}" if missing else f"holds {foreign[0]}, which this run does not have"
        raise ConfigError(f"{checkpoint} is of another model or head: it {words}")
    for name, value in targets.items():
        if tuple(stored[name].size) != tuple(value.shape):
            raise ConfigError(
                f"{checkpoint} is of another model or head: {name} is {list(stored[name].size)} there and "
                f"{list(value.shape)} in this run"
            )


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """Write ``folder``. A collective: every rank calls it. ``manifest`` is the first rank's.

    Raises:
        CheckpointFailed: on every rank, if it cannot be written (a full disk); no other checkpoint is touched.
    """
    distributed = dist.is_initialized()
    first = not distributed or dist.get_rank() == 0
    temporary = folder.with_name(f".{folder.name}.incomplete")
    try:
        _together(lambda: _make_empty(temporary) if first else None)
        _together(lambda: _write_tensors(temporary, tensors, distributed))
        files = _together(lambda: _describe_mine(temporary))
        _together(lambda: _finish(temporary, folder, manifest, files) if first else None)
    except CheckpointFailed:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)  # its room is needed
        raise


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_tensors(folder: Path, tensors: dict[str, Tensor], distributed: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about saving in a single process, which is meant
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder, sync_files=True), no_dist=not distributed)


def _describe_mine(folder: Path) -> dict[str, dict[str, Any]]:
    """Sizes and digests of this rank's share of the files."""
    paths = sorted(folder.iterdir())
    if dist.is_initialized():
        paths = paths[dist.get_rank() :: dist.get_world_size()]
    return {path.name: _describe(path) for path in paths}


def _finish(temporary: Path, folder: Path, manifest: dict[str, Any], files: list[dict[str, Any]]) -> None:
    """Write the manifest, and give the folder its name: only now it is a checkpoint."""
    described = dict(sorted((name, file) for part in files for name, file in part.items()))
    path = temporary / MANIFEST
    content = {"format": FORMAT, **manifest, "files": described, "torch": torch.__version__}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _sync(path)
    _sync(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _sync(folder.parent)


def _together(work: Callable[[], Any]) -> list[Any]:
    """What ``work`` gives on each rank; where it fails on one, the same error on all of them. A collective."""
    mine: tuple[Any, str | None]
    try:
        mine = work(), None
    except (OSError, CheckpointException) as error:
        mine = None, f"{type(error).__name__}: {error}"
    results = [mine]
    if dist.is_initialized():
        results = [mine] * dist.get_world_size()
        dist.all_gather_object(results, mine)
    failed = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(results) if reason]
    if failed:
        raise CheckpointFailed(f"the checkpoint could not be written ({failed[0]}); is the disk full?")
    return [value for value, _ in results]


def newest_whole(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in ``folder`` all of whose files are as they were written, and its manifest.

    Damaged ones are reported and passed over. A collective; the ranks share the reading, and agree.
    """
    for checkpoint in _agreed(step_folders(folder)):
        try:
            manifest = _agreed(_or_error(checkpoint))
            if isinstance(manifest, DamagedCheckpoint):
                raise manifest
            problems = _check_all(checkpoint, manifest["files"])
            if problems:
                raise DamagedCheckpoint(f"{checkpoint}: {'; '.join(problems)}")
            return checkpoint, manifest
        except DamagedCheckpoint as error:
            if not dist.is_initialized() or dist.get_rank() == 0:
                log(f"damaged checkpoint, the one before is used: {error}")
    return None


def _or_error(checkpoint: Path) -> dict[str, Any] | DamagedCheckpoint:
    try:
        return read_manifest(checkpoint)
    except DamagedCheckpoint as error:
        return error


def _agreed(value: Any) -> Any:
    """The first rank's ``value``."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _check_all(checkpoint: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the checkpoint's files; the ranks share the reading. A collective."""
    names = sorted(files)
    mine = names[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else names
    found = [problem for name in mine if (problem := check_file(checkpoint, name, files[name]))]
    if not dist.is_initialized():
        return found
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, found)
    return [problem for part in parts for problem in part]


def _sharded(head: PartialFC, local: Tensor) -> Tensor:
    """``local``, this rank's rows, as its part of the tensor of all classes."""
    if not head.collectives.distributed:
        return local
    mesh = DeviceMesh(local.device.type, torch.arange(head.collectives.world_size))
    shape = torch.Size((head.num_classes, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
