"""State of a backbone that DeepSpeed has partitioned, under its checkpoint names.

Each class below reads and writes the float32 values of DeepSpeed's optimizer for some ZeRO stages, one parameter at a
time: no rank holds more than one whole parameter, except rank 0, which passes all of them to the checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from partialfc.engines.state import OPTIMIZER, WEIGHTS, device_of_state
from partialfc.runtime.collectives import is_rank0


class ZeroState(ABC):
    """State of a backbone under a DeepSpeed engine.

    Args:
        module: the backbone before ``deepspeed.initialize``, its tensors whole; :meth:`attach` adds the engine.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self._first_weights = {  # on the host: device memory is scarcer
            f"{WEIGHTS}{name}": parameter.detach().to("cpu", copy=True) for name, parameter in module.named_parameters()
        }
        self._frozen: dict[nn.Parameter, Tensor] = {}  # float32; the forward pass may use a lower precision
        self._engine: Any = None

    def attach(self, engine: Any) -> None:
        """Use ``engine``, reset to the module's initial weights and a fresh optimizer: DeepSpeed copies the weights
        after rounding them, and may have taken a step on zero gradients. A collective.
        """
        self._engine = engine
        self.load(self._first_weights)
        self._first_weights = {}

    def tensors(self) -> dict[str, Tensor]:
        found = self.weights(keep=is_rank0())
        for name, parameter in self.module.named_parameters():
            for key in self._keys() if parameter.requires_grad else ():
                value = self._read(parameter, key)
                if is_rank0():
                    found[f"{OPTIMIZER}{name}.{key}"] = value.cpu()
        return found

    @torch.no_grad()
    def weights(self, keep: bool = True, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return weights and buffers, float32; nothing without ``keep``, on ranks that only take part. A collective."""
        found: dict[str, Tensor] = {}
        whole: dict[Tensor, Tensor] = {}  # a shared parameter has two names
        for name, value in self.module.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                if value not in whole:
                    read = self._read(value, None)
                    whole[value] = read.to(device) if keep else read.new_empty(0)
                value = whole[value]
            if keep:
                found[f"{WEIGHTS}{name}"] = value.detach()
        return found

    def targets(self) -> dict[str, Tensor]:
        by_parameter = {
            parameter: torch.empty(self._shapes[name]) for name, parameter in self.module.named_parameters()
        }
        return {
            f"{WEIGHTS}{name}": by_parameter[value] if isinstance(value, nn.Parameter) else value.detach()
            for name, value in self.module.state_dict(keep_vars=True).items()
        }

    def shapes(self) -> dict[str, torch.Size]:
        return self._shapes

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        keys = {name.rpartition(".")[2] for name in tensors if name.startswith(OPTIMIZER)}
        self._add_keys(keys)
        for name, parameter in self.module.named_parameters():
            value = tensors[f"{WEIGHTS}{name}"]
            if not parameter.requires_grad:
                self._frozen[parameter] = value.detach().to("cpu", torch.float32, copy=True)
            self._write(parameter, None, value)
            for key in self._keys() if parameter.requires_grad else ():
                zeros = torch.zeros(() if key == "step" else self._shapes[name])
                self._write(parameter, key, tensors.get(f"{OPTIMIZER}{name}.{key}", zeros))
        self._copy_to_forward(tensors)

    def kept(self) -> list[Tensor]:
        """Return the tensors of this rank's optimizer: the float32 weights that it updates, and their state."""
        values = [value for state in self._optimizer.state.values() for value in state.values()]
        return [*self._pieces(), *(value for value in values if isinstance(value, Tensor))]

    # --- one parameter ------------------------------------------------------------------------------------------------

    def _keys(self) -> list[str]:
        """Return the names of the optimizer's state tensors, equal for all parameters and on all ranks."""
        state: dict[str, Any] = next((self._optimizer.state[piece] for piece in self._pieces()), {})
        return [key for key, value in state.items() if isinstance(value, Tensor)]

    def _add_keys(self, keys: Iterable[str]) -> None:
        """Add missing ``keys`` to the optimizer's state, which is empty before the first step."""
        for piece in self._pieces():
            state = self._optimizer.state[piece]
            for key in keys:
                shape = () if key == "step" else piece.shape
                device = device_of_state(self._optimizer, piece, key)
                state.setdefault(key, torch.zeros(shape, dtype=torch.float32, device=device))

    def _read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """Return the whole float32 value of a parameter, or of the optimizer's ``key`` for it. A collective."""
        if not parameter.requires_grad:
            return self._frozen[parameter]
        if key == "step":
            return self._optimizer.state[self._pieces()[0]]["step"]
        return self._read_whole(parameter, key)

    def _write(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        if key == "step":
            for piece in self._pieces():
                self._optimizer.state[piece]["step"].copy_(value)
        else:
            self._write_whole(parameter, key, value)

    # --- by stage -----------------------------------------------------------------------------------------------------

    @property
    def _optimizer(self) -> Optimizer:
        """The torch optimizer inside DeepSpeed's, which updates float32 pieces."""
        inner: Optimizer = self._engine.optimizer.optimizer
        return inner

    @abstractmethod
    def _pieces(self) -> list[Tensor]:
        """Return the tensors that this rank's optimizer updates."""

    @abstractmethod
    def _read_whole(self, parameter: nn.Parameter, key: str | None) -> Tensor: ...

    @abstractmethod
    def _write_whole(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None: ...

    @abstractmethod
    def _copy_to_forward(self, tensors: dict[str, Tensor]) -> None:
        """Copy the written weights to those that the forward pass uses."""


class Zero0State(ZeroState):
    """Stage 0 in half precision: every rank holds all weights, in float32 and in the dtype of the forward pass."""

    def _pieces(self) -> list[Tensor]:
        return [master for group in self._engine.optimizer.fp32_groups for master in group]

    def _master(self, parameter: nn.Parameter) -> Tensor:
        halves = [half for group in self._engine.optimizer.fp16_groups for half in group]
        masters = dict(zip(halves, self._pieces(), strict=True))
        return masters.get(parameter, parameter)

    def _read_whole(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        master = self._master(parameter)
        return master.detach().float() if key is None else self._optimizer.state[master][key]

    def _write_whole(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        master = self._master(parameter)
        (master if key is None else self._optimizer.state[master][key]).copy_(value)

    def _copy_to_forward(self, tensors: dict[str, Tensor]) -> None:
        for parameter in self.module.parameters():
            parameter.copy_(self._master(parameter))


class Zero12State(ZeroState):
    """Stages 1 and 2: each rank's optimizer updates its part of one flat tensor."""

    def _pieces(self) -> list[Tensor]:
        pieces: list[Tensor] = self._engine.optimizer.single_partition_of_fp32_groups
        return pieces

    def _add_keys(self, keys: Iterable[str]) -> None:
        super()._add_keys(keys)
        if self._keys():
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()  # as after its first step

    def _read_whole(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        return _read_partitioned(parameter, key)

    def _write_whole(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if not parameter.requires_grad:
            parameter.copy_(value)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _copy_to_forward(self, tensors: dict[str, Tensor]) -> None:
        self._engine.optimizer.update_lp_params()


class Zero3State(ZeroState):
    """Stage 3: the weights of the forward pass are split too, and gathered where they are used."""

    def _pieces(self) -> list[Tensor]:
        pieces: list[Tensor] = self._engine.optimizer.fp32_partitioned_groups_flat
        return pieces

    def _read_whole(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        return _read_partitioned(parameter, key)

    def _write_whole(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        # DeepSpeed 0.19's function for whole values fails on sizes that the ranks do not share evenly.
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if not parameter.requires_grad:
            return
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed's, on every parameter
        piece = torch.zeros(size, dtype=value.dtype)
        part = value.flatten()[dist.get_rank() * size : (dist.get_rank() + 1) * size]
        piece[: len(part)] = part
        if key is None:
            safe_set_local_fp32_param(parameter, piece)
        else:
            safe_set_local_optimizer_state(parameter, piece, key)

    def _copy_to_forward(self, tensors: dict[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in self.module.named_parameters():
            with GatheredParameters([parameter], modifier_rank=0):
                if is_rank0():
                    parameter.copy_(tensors[f"{WEIGHTS}{name}"])


def _read_partitioned(parameter: nn.Parameter, key: str | None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    read = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
    whole: Tensor = read
    return whole
