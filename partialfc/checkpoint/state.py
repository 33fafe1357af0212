"""Checkpoints: torch DCP, everything per class as a ``Shard(0)`` DTensor, beside a manifest of sizes and digests.

A checkpoint folder is complete or absent: it is written under a temporary name, synced, and renamed. It loads on any
number of ranks: each takes its own range of the classes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from partialfc.checkpoint.folders import (
    CheckedReader,
    DamagedCheckpoint,
    check_file,
    read_manifest,
    step_folders,
)
from partialfc.checkpoint.row_planner import RowLoadPlanner, read_tensors
from partialfc.engines.state import OPTIMIZER, WEIGHTS, BackboneState
from partialfc.errors import ConfigError
from partialfc.head import PartialFC
from partialfc.runtime.collectives import all_gather_object, broadcast_from_rank0, is_rank0, rank_slice
from partialfc.tracking.console import log

_PER_CLASS = {"weight", "bias", "center_loss.centers"}  # of the head
_HEAD_OPTIMIZER = "head.optimizer."


class TrainingState:
    """Everything of a run that is tensors, by the names that checkpoints use.

    Replicated tensors are saved as they are; those with one row a class as DTensors over the ranks. Without optimizers
    it only loads what an evaluation needs.
    """

    def __init__(self, backbone: BackboneState, head: PartialFC, head_optimizer: Optimizer | None = None) -> None:
        self.backbone, self.head, self.head_optimizer = backbone, head, head_optimizer

    def tensors(self) -> dict[str, Tensor]:
        """All of them, as they lie. A collective."""
        assert self.head_optimizer is not None
        found = self.backbone.tensors() | self._of_head()
        for name, parameter in self.head.named_parameters():
            for key, value in self.head_optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{_HEAD_OPTIMIZER}{name}.{key}"] = value
        return {
            name: _sharded(self.head, value) if _has_rows(name, value.dim()) else value for name, value in found.items()
        }

    def _of_head(self) -> dict[str, Tensor]:
        return {f"head.{name}": value for name, value in self.head.state_dict().items()}

    def load(self, checkpoint: Path, grow: bool = False) -> int:
        """Take everything from a checkpoint folder that has been checked. A collective of the head's ranks.

        With ``grow`` it may be of fewer classes: the others keep the weight that they have, and their optimizer state
        is zero, as at the start.

        Returns:
            The number of classes that the checkpoint has.
        Raises:
            ConfigError: it is of another model, head or number of classes.
            DamagedCheckpoint: it cannot be read.
        """
        reader = CheckedReader(checkpoint)
        stored = reader.read_metadata().state_dict_metadata
        targets = self.backbone.targets() | self._of_head()
        self._check_shapes(checkpoint, targets, stored, grow)
        weight: Any = stored["head.weight"]
        num_classes: int = weight.size[0]
        owners = {OPTIMIZER: self.backbone.shapes(), _HEAD_OPTIMIZER: self._shapes_of_head()}
        wanted = tuple(owners) if self.head_optimizer is not None else ()
        for name, entry in stored.items():
            prefix = next((prefix for prefix in wanted if name.startswith(prefix)), None)
            if prefix is None or not isinstance(entry, TensorStorageMetadata):
                continue
            owner = name.removeprefix(prefix).rpartition(".")[0]
            if owner not in owners[prefix]:
                raise ConfigError(f"{checkpoint} holds optimizer state of {owner!r}, which this run does not have")
            parameter = owners[prefix][owner]
            rows = _has_rows(name, len(entry.size))
            shape = torch.Size((parameter[0], *entry.size[1:])) if rows else entry.size
            if shape not in ((), parameter[:1], parameter) or (rows and entry.size[0] != num_classes):
                raise ConfigError(f"{checkpoint} is of another optimizer: {name} is {list(entry.size)} there")
            device = self.head.weight.device if prefix == _HEAD_OPTIMIZER and shape else torch.device("cpu")
            targets[name] = torch.zeros(shape, dtype=entry.properties.dtype, device=device)
        first = self.head.first_class
        planner = RowLoadPlanner({name: first for name, value in targets.items() if _has_rows(name, value.dim())})
        read_tensors(reader, targets, planner, self.head.collectives.group)
        self.backbone.load({name: value for name, value in targets.items() if name.startswith((WEIGHTS, OPTIMIZER))})
        optimizer = self.head_optimizer
        if optimizer is not None:
            optimizer.state.clear()
        parameters = dict(self.head.named_parameters())
        for name, value in targets.items():
            if name.startswith(_HEAD_OPTIMIZER):
                owner, _, key = name.removeprefix(_HEAD_OPTIMIZER).rpartition(".")
                assert optimizer is not None
                optimizer.state[parameters[owner]][key] = value
        self.head.restart_step()
        return num_classes

    def _shapes_of_head(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.head.named_parameters()}

    def _check_shapes(self, checkpoint: Path, targets: dict[str, Tensor], stored: dict[str, Any], grow: bool) -> None:
        missing = [name for name in targets if name not in stored]
        optimizers = (OPTIMIZER, _HEAD_OPTIMIZER)
        foreign = [name for name in stored if name not in targets and not name.startswith(optimizers)]
        if missing or foreign:
            words = f"lacks {missing[0]}" if missing else f"holds {foreign[0]}, which this run does not have"
            raise ConfigError(f"{checkpoint} is of another model or head: it {words}")
        for name, value in targets.items():
            rows = _has_rows(name, value.dim())
            here = [self.head.num_classes, *value.shape[1:]] if rows else list(value.shape)
            there = list(stored[name].size)
            fits = there[1:] == here[1:] and there[0] <= here[0] if rows and grow else there == here
            if not fits:
                raise ConfigError(
                    f"{checkpoint} is of another model or head: {name} is {there} there and {here} in this run"
                )


def _has_rows(name: str, dimensions: int) -> bool:
    """Whether a tensor of this name has one row a class; an optimizer's own step count has none."""
    owner = name.removeprefix(_HEAD_OPTIMIZER).rpartition(".")[0] if name.startswith(_HEAD_OPTIMIZER) else name[5:]
    return name.startswith("head.") and owner in _PER_CLASS and dimensions > 0


def latest_valid(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in ``folder`` all of whose files are as they were written, and its manifest.

    Damaged ones are reported and passed over. A collective; the ranks share the reading, and agree.
    """
    for checkpoint in broadcast_from_rank0(lambda: step_folders(folder)):
        try:
            manifest = broadcast_from_rank0(partial(read_manifest, checkpoint))
            files = manifest["files"]
            mine = [check_file(checkpoint, name, files[name]) for name in rank_slice(sorted(files))]
            problems = [problem for part in all_gather_object(mine) for problem in part if problem]
            if problems:
                raise DamagedCheckpoint(f"{checkpoint}: {'; '.join(problems)}")
            return checkpoint, manifest
        except DamagedCheckpoint as error:
            if is_rank0():
                log(f"damaged checkpoint, the one before is used: {error}")
    return None


def _sharded(head: PartialFC, local: Tensor) -> Tensor:
    """``local``, this rank's rows, as its part of the tensor of all classes."""
    if not head.collectives.distributed:
        return local
    mesh = DeviceMesh(local.device.type, torch.arange(head.collectives.world_size))
    shape = torch.Size((head.num_classes, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
