"""The state of a backbone that DeepSpeed has cut into pieces, under the names that checkpoints use.

Each of the classes below gets at the float32 values of DeepSpeed's optimizer for some ZeRO stages: one parameter at a
time, so that no rank holds more than one that is whole, but for the first rank, which hands all to the checkpoint.
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


class ZeroState(ABC):
    """A backbone under a DeepSpeed engine.

    Args:
        module: before ``deepspeed.initialize``, when its tensors are whole; :meth:`attach` gives the engine.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self._first = {  # if another device has them, memory there is what is short
            f"{WEIGHTS}{name}": parameter.detach().to("cpu", copy=True) for name, parameter in module.named_parameters()
        }
        self._frozen: dict[nn.Parameter, Tensor] = {}  # float32: the forward pass may have them in less
        self._engine: Any = None

    def attach(self, engine: Any) -> None:
        """From now on the state is that of ``engine``, which begins with the weights that the module had, and with an
        optimizer that has not stepped: DeepSpeed takes the weights when they are rounded already, and may have made a
        step with gradients of zero. A collective.
        """
        self._engine = engine
        self.take(self._first)
        self._first = {}

    def tensors(self) -> dict[str, Tensor]:
        found = self.weights(keep=_is_first())
        for name, parameter in self.module.named_parameters():
            for key in self._keys() if parameter.requires_grad else ():
                value = self._read(parameter, key)
                if _is_first():
                    found[f"{OPTIMIZER}{name}.{key}"] = value.cpu()
        return found

    @torch.no_grad()
    def weights(self, keep: bool = True, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Weights and buffers alone, float32; with ``keep`` false nothing, on a rank that only helps. A collective."""
        found: dict[str, Tensor] = {}
        whole: dict[Tensor, Tensor] = {}  # one parameter may have two names
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
    def take(self, tensors: dict[str, Tensor]) -> None:
        keys = {name.rpartition(".")[2] for name in tensors if name.startswith(OPTIMIZER)}
        self._make_room(keys)
        for name, parameter in self.module.named_parameters():
            value = tensors[f"{WEIGHTS}{name}"]
            if not parameter.requires_grad:
                self._frozen[parameter] = value.detach().to("cpu", torch.float32, copy=True)
            self._write(parameter, None, value)
            for key in self._keys() if parameter.requires_grad else ():
                nothing = torch.zeros(() if key == "step" else self._shapes[name])
                self._write(parameter, key, tensors.get(f"{OPTIMIZER}{name}.{key}", nothing))
        self._renew_weights(tensors)

    def kept(self) -> list[Tensor]:
        """What this rank's optimizer has in memory: the float32 weights that it steps on, and their state."""
        values = [value for state in self._optimizer.state.values() for value in state.values()]
        return [*self._pieces(), *(value for value in values if isinstance(value, Tensor))]

    # --- one parameter ------------------------------------------------------------------------------------------------

    def _keys(self) -> list[str]:
        """What the optimizer keeps of a parameter: the same of each, and on every rank."""
        state: dict[str, Any] = next((self._optimizer.state[piece] for piece in self._pieces()), {})
        return [key for key, value in state.items() if isinstance(value, Tensor)]

    def _make_room(self, keys: Iterable[str]) -> None:
        """Have all of ``keys`` in the optimizer's state, which before the first step has none."""
        for piece in self._pieces():
            state = self._optimizer.state[piece]
            for key in keys:
                shape = () if key == "step" else piece.shape
                device = device_of_state(self._optimizer, piece, key)
                state.setdefault(key, torch.zeros(shape, dtype=torch.float32, device=device))

    def _read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """The float32 value of a parameter, or of the optimizer's ``key`` for it, whole. A collective."""
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

    # --- of a stage ---------------------------------------------------------------------------------------------------

    @property
    def _optimizer(self) -> Optimizer:
        """The optimizer that does the arithmetic, on float32 pieces."""
        inner: Optimizer = self._engine.optimizer.optimizer
        return inner

    @abstractmethod
    def _pieces(self) -> list[Tensor]:
        """The tensors that this rank's optimizer steps on."""

    @abstractmethod
    def _read_whole(self, parameter: nn.Parameter, key: str | None) -> Tensor: ...

    @abstractmethod
    def _write_whole(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None: ...

    @abstractmethod
    def _renew_weights(self, tensors: dict[str, Tensor]) -> None:
        """Make the weights that the forward pass uses from those that were written."""


class Zero0State(ZeroState):
    """Stage 0 in half precision: every rank has all, the float32 weights beside those of the forward pass."""

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

    def _renew_weights(self, tensors: dict[str, Tensor]) -> None:
        for parameter in self.module.parameters():
            parameter.copy_(self._master(parameter))


class Zero12State(ZeroState):
    """Stages 1 and 2: the optimizer of each rank steps on its part of one flat tensor."""

    def _pieces(self) -> list[Tensor]:
        pieces: list[Tensor] = self._engine.optimizer.single_partition_of_fp32_groups
        return pieces

    def _make_room(self, keys: Iterable[str]) -> None:
        super()._make_room(keys)
        if self._keys():
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()  # as after its first step

    def _read_whole(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: Tensor = (
            safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        )
        return found

    def _write_whole(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if not parameter.requires_grad:
            parameter.copy_(value)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _renew_weights(self, tensors: dict[str, Tensor]) -> None:
        self._engine.optimizer.update_lp_params()


class Zero3State(ZeroState):
    """Stage 3: the weights of the forward pass are split, too, and gathered where they are used."""

    def _pieces(self) -> list[Tensor]:
        pieces: list[Tensor] = self._engine.optimizer.fp32_partitioned_groups_flat
        return pieces

    def _read_whole(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: Tensor = (
            safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        )
        return found

    def _write_whole(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        # Not by the function for whole values: in DeepSpeed 0.19 it fails on those that ranks cannot share evenly.
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if not parameter.requires_grad:
            return
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed's, on every parameter
        mine = torch.zeros(size, dtype=value.dtype)
        part = value.flatten()[dist.get_rank() * size : (dist.get_rank() + 1) * size]
        mine[: len(part)] = part
        if key is None:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, key)

    def _renew_weights(self, tensors: dict[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in self.module.named_parameters():
            with GatheredParameters([parameter], modifier_rank=0):
                if dist.get_rank() == 0:
                    parameter.copy_(tensors[f"{WEIGHTS}{name}"])


def _is_first() -> bool:
    return dist.get_rank() == 0
