"""A backbone's whole weights and optimizer state, under their checkpoint names."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

WEIGHTS, OPTIMIZER = "backbone.", "backbone_optimizer."


class BackboneState(Protocol):
    """Whole tensors of a backbone for checkpoints, whichever ranks hold their parts.

    Names are ``backbone.<name in the module>`` and ``backbone_optimizer.<parameter>.<key>``.
    """

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, on rank 0 at least; training may change them later. A collective."""

    def targets(self) -> dict[str, Tensor]:
        """Return tensors to read a checkpoint's weights and buffers into. A collective."""

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each parameter, by its name in the module."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load ``tensors``: the filled targets and the optimizer's state. A collective."""


class ReplicatedBackbone:
    """A backbone that every rank holds in full; without an optimizer, for an evaluation."""

    def __init__(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        self.module, self.optimizer = module, optimizer

    def tensors(self) -> dict[str, Tensor]:
        assert self.optimizer is not None
        found = self.targets()
        for name, parameter in self.module.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{OPTIMIZER}{name}.{key}"] = value
        return found

    def targets(self) -> dict[str, Tensor]:
        return {f"{WEIGHTS}{name}": value for name, value in self.module.state_dict().items()}

    def shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.module.named_parameters()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        if self.optimizer is None:
            return
        parameters = dict(self.module.named_parameters())
        self.optimizer.state.clear()
        for name, value in tensors.items():
            if name.startswith(OPTIMIZER):  # weights and buffers were read into place
                owner, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
                parameter = parameters[owner]
                self.optimizer.state[parameter][key] = value.to(device_of_state(self.optimizer, parameter, key))


def device_of_state(optimizer: Optimizer, parameter: Tensor, key: str) -> torch.device:
    """Return the device on which an optimizer keeps ``key``: the host for step counts, unless its kernel is fused."""
    on_device = any(optimizer.defaults.get(kind) for kind in ("fused", "capturable"))
    return parameter.device if key != "step" or on_device else torch.device("cpu")
