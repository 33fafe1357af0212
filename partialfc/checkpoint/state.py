"""All tensors of a run under their checkpoint names: saved from any number of ranks, loaded on any other.

A tensor with one row per class is a ``Shard(0)`` DTensor over the ranks; each rank reads its own range of classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from partialfc.checkpoint.fit import require_fit
from partialfc.checkpoint.reader import CheckedReader, stored_tensors
from partialfc.checkpoint.row_planner import RowLoadPlanner, read_tensors
from partialfc.engines.state import OPTIMIZER, WEIGHTS, BackboneState
from partialfc.errors import ConfigError
from partialfc.head import PartialFC

_PER_CLASS = {"weight", "bias", "center_loss.centers"}  # of the head
_HEAD, _HEAD_OPTIMIZER = "head.", "head.optimizer."


class TrainingState:
    """Weights, buffers and optimizer state of the backbone and the head.

    Args:
        head_optimizer: None for an evaluation, which needs no optimizer state.
    """

    def __init__(self, backbone: BackboneState, head: PartialFC, head_optimizer: Optimizer | None = None) -> None:
        self.backbone, self.head, self.head_optimizer = backbone, head, head_optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, uncopied; those with one row per class as DTensors. A collective."""
        assert self.head_optimizer is not None
        found = self.backbone.tensors() | self._head_tensors()
        for name, parameter in self.head.named_parameters():
            for key, value in self.head_optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{_HEAD_OPTIMIZER}{name}.{key}"] = value
        return {
            name: _sharded(self.head, value) if _has_rows(name, value.dim()) else value for name, value in found.items()
        }

    def load(self, checkpoint: Path, grow: bool = False) -> int:
        """Load all tensors from a verified checkpoint folder. A collective of the head's ranks.

        Args:
            grow: accept a checkpoint with fewer classes; new ones keep their weights, with zero optimizer state.

        Returns:
            The number of classes in the checkpoint.

        Raises:
            ConfigError: its model, head, optimizer or number of classes differs.
            DamagedCheckpoint: it cannot be read.
        """
        stored = stored_tensors(checkpoint)
        targets = self.backbone.targets() | self._head_tensors()
        self._check_shapes(checkpoint, targets, stored, grow)
        targets |= self._optimizer_targets(checkpoint, stored)
        first = self.head.first_class
        planner = RowLoadPlanner({name: first for name, value in targets.items() if _has_rows(name, value.dim())})
        read_tensors(CheckedReader(checkpoint), targets, planner, self.head.collectives.group)
        self.backbone.load({name: value for name, value in targets.items() if name.startswith((WEIGHTS, OPTIMIZER))})
        self._set_head_optimizer(targets)
        self.head.restart_step()
        return stored["head.weight"].size[0]

    def _head_tensors(self) -> dict[str, Tensor]:
        return {f"{_HEAD}{name}": value for name, value in self.head.state_dict().items()}

    def _optimizer_targets(self, checkpoint: Path, stored: dict[str, TensorStorageMetadata]) -> dict[str, Tensor]:
        """Return zeros in this rank's shapes of the checkpoint's optimizer state."""
        if self.head_optimizer is None:
            return {}
        head_shapes = {name: parameter.shape for name, parameter in self.head.named_parameters()}
        shapes = {OPTIMIZER: self.backbone.shapes(), _HEAD_OPTIMIZER: head_shapes}
        num_classes = stored["head.weight"].size[0]
        targets = {}
        for name, entry in stored.items():
            prefix = next((prefix for prefix in shapes if name.startswith(prefix)), None)
            if prefix is None:
                continue
            owner = name.removeprefix(prefix).rpartition(".")[0]
            if owner not in shapes[prefix]:
                raise ConfigError(f"{checkpoint} holds optimizer state of {owner!r}, which this run does not have")
            parameter = shapes[prefix][owner]
            rows = _has_rows(name, len(entry.size))
            shape = torch.Size((parameter[0], *entry.size[1:])) if rows else entry.size
            if shape not in ((), parameter[:1], parameter) or (rows and entry.size[0] != num_classes):
                raise ConfigError(
                    f"{checkpoint} does not fit this optimizer: {name} has shape {list(entry.size)} there"
                )
            device = self.head.weight.device if prefix == _HEAD_OPTIMIZER and shape else torch.device("cpu")
            targets[name] = torch.zeros(shape, dtype=entry.properties.dtype, device=device)
        return targets

    def _set_head_optimizer(self, tensors: dict[str, Tensor]) -> None:
        if self.head_optimizer is None:
            return
        self.head_optimizer.state.clear()
        parameters = dict(self.head.named_parameters())
        for name, value in tensors.items():
            if name.startswith(_HEAD_OPTIMIZER):
                owner, _, key = name.removeprefix(_HEAD_OPTIMIZER).rpartition(".")
                self.head_optimizer.state[parameters[owner]][key] = value

    def _check_shapes(
        self, checkpoint: Path, targets: dict[str, Tensor], stored: dict[str, TensorStorageMetadata], grow: bool
    ) -> None:
        rows = {name for name, value in targets.items() if _has_rows(name, value.dim())}
        shapes = {
            name: (self.head.num_classes, *value.shape[1:]) if name in rows else value.shape
            for name, value in targets.items()
        }
        weights = {name: entry for name, entry in stored.items() if not name.startswith((OPTIMIZER, _HEAD_OPTIMIZER))}
        require_fit(checkpoint, shapes, weights, growing=rows if grow else ())


def _has_rows(name: str, dimensions: int) -> bool:
    """Return True if a tensor of this name has one row per class; an optimizer's own step counter has not."""
    if name.startswith(_HEAD_OPTIMIZER):
        owner = name.removeprefix(_HEAD_OPTIMIZER).rpartition(".")[0]
    else:
        owner = name.removeprefix(_HEAD)
    return name.startswith(_HEAD) and owner in _PER_CLASS and dimensions > 0


def _sharded(head: PartialFC, local: Tensor) -> Tensor:
    """Return ``local``, this rank's rows, as its shard of the tensor of all classes."""
    if not head.collectives.distributed:
        return local
    mesh = DeviceMesh(local.device.type, torch.arange(head.collectives.world_size))
    shape = torch.Size((head.num_classes, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
