"""What arcface_torch's files hold besides weights: optimizer state, epoch and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from partialfc.config import Config
from partialfc.data.order import BatchOrder
from partialfc.engines.state import OPTIMIZER, BackboneState
from partialfc.errors import DataError
from partialfc.exchange.head_shards import copy_rows, find_shards, read_rows
from partialfc.head import PartialFC
from partialfc.head.optim.base import RowOptimizer
from partialfc.models.weights import check_finite, plain_name, read_weights

_MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
_MOMENTUM_FILE = "_softmax_weight", "_softmax_weight_mom"  # a weight's file, and its momentum's beside it


class NotKept(Exception):
    """Why something in the files is left there, in a few words."""


@dataclass(frozen=True)
class Position:
    """Place in a run of arcface_torch: epochs that are done, and its steps, one a micro-batch."""

    epoch: int
    step: int


def common_position(backbone: Path | None, head: Path | None) -> Position | None:
    """Return the place at which backbone and head were written; None if no file says.

    Raises:
        NotKept: only one of them is given, or they are of different places.
        DataError: two shards of the head are of different places.
    """
    found = {_position_of(read_weights(backbone))} if backbone is not None else {None}
    found |= {_position_of_shards(find_shards(head))} if head is not None else {None}
    if len(found) > 1:
        places = " and ".join(_describe(position) for position in found if position is not None)
        raise NotKept(f"{places}, since that takes a backbone and a head of the same place")
    return found.pop()


def _position_of_shards(files: list[Path]) -> Position | None:
    found = [_position_of(read_weights(file)) for file in files]
    for file, position in zip(files, found, strict=True):
        if position != found[0]:
            raise DataError(f"{file} is of {_describe(position)}, and {files[0]} of {_describe(found[0])}")
    return found[0]


def _position_of(content: dict[str, Any]) -> Position | None:
    epoch, step = content.get("epoch"), content.get("global_step")
    if type(epoch) is not int or type(step) is not int or not (0 <= epoch < 10**6 and 0 <= step < 10**10):
        return None
    return Position(epoch, step)


def _describe(position: Position | None) -> str:
    return "no known step" if position is None else f"epoch {position.epoch}, step {position.step:,}"


def continuing_step(config: Config, order: BatchOrder, total_steps: int, position: Position) -> int:
    """Return the step at which this run continues where another one was.

    Raises:
        NotKept: its epochs have another number of steps, or this run would be over.
    """
    own = order.steps_per_epoch * config.optim.accumulation
    # Each rank of arcface_torch rounds its samples up, which may make one step more of an epoch.
    if abs(position.step - position.epoch * own) > position.epoch * config.optim.accumulation or not position.epoch:
        raise NotKept(
            f"{_describe(position)}, since an epoch has {own:,} of its steps here: another batch size or another data "
            "set; the run starts at step 0"
        )
    step = position.epoch * order.steps_per_epoch
    if step >= total_steps:
        raise NotKept(
            f"{_describe(position)}, since optim.epochs={config.optim.epochs:g} ends there: it starts at step 0"
        )
    return step


def load_backbone_state(config: Config, backbone: nn.Module, state: BackboneState, path: Path) -> None:
    """Load the state of the backbone's optimizer from a ``checkpoint_gpu_*.pt``.

    Raises:
        NotKept: there is none, or it is of another optimizer.
        DataError: it holds NaN.
    """
    content = read_weights(path)
    optimizer, weights = content.get("state_optimizer"), content.get("state_dict_backbone")
    if not isinstance(optimizer, dict) or not isinstance(weights, dict):
        raise NotKept("the backbone's optimizer state: its file has none")
    parameters = dict(backbone.named_parameters())
    # The optimizer numbers parameters in the order of the module, which its state dict has, too.
    names = [name for name in map(plain_name, map(str, weights)) if name in parameters]
    numbers = _numbers(optimizer, 0)
    if len(numbers) != len(parameters) or len(names) != len(parameters):
        raise NotKept("the backbone's optimizer state: it is of other parameters")
    if config.optim.name == "sgd" and not config.optim.momentum:
        raise NotKept("the backbone's momentum: optim.momentum is 0")
    tensors: dict[str, Tensor] = {}
    for number, name in zip(numbers, names, strict=True):
        if parameters[name].requires_grad:
            kept = _moments(config.optim.name, optimizer, number, parameters[name].shape)
            for key, value in kept.items():
                check_finite(f"{path}: {key} of {name}", value)
                tensors[f"{OPTIMIZER}{name}.{key}"] = value.to(parameters[name].device, torch.float32, copy=True)
    state.load(tensors)


def load_head_state(config: Config, head: PartialFC, optimizer: RowOptimizer, path: Path, step: int) -> None:
    """Load this rank's rows of the head's optimizer state.

    Args:
        path: set of shards, or one of them.
        step: number of steps that the optimizer has taken.

    Raises:
        NotKept: on all ranks, there is none, or it is of another optimizer.
        DataError: it holds NaN.
    """
    kind = config.optim.head_optimizer
    if kind not in _MOMENTS:
        raise NotKept(f"the head's optimizer state: {kind} takes none of another optimizer")
    shards = find_shards(path)
    found = [_head_moments(kind, shard) for shard in shards]  # of all: a rank must not keep what another leaves
    group = optimizer.param_groups[0]
    state = optimizer.state_of(head.weight, group)
    for key in _MOMENTS[kind]:
        if key not in state:
            raise NotKept("the head's optimizer state: optim.momentum is 0")
    for key in _MOMENTS[kind]:
        by_shard = {shard: moments[key] for shard, moments in zip(shards, found, strict=True)}
        copy_rows(head, shards, by_shard.__getitem__, state[key])
    if "row_steps" in state:
        state["row_steps"].fill_(int(found[0]["step"]))
    state["step"].fill_(step)


def _head_moments(kind: str, shard: Path) -> dict[str, Tensor]:
    shape = read_rows(shard).shape
    weight, momentum = _MOMENTUM_FILE
    if shard.stem.endswith(weight):
        beside = shard.with_name(shard.name.replace(weight, momentum))
        if kind != "sgd" or not beside.exists():
            raise NotKept(f"the head's momentum: {'it is of SGD' if kind != 'sgd' else f'there is no {beside.name}'}")
        value = read_weights(beside).get("weight")
        if not _is_plain(value) or value.shape != shape:
            raise NotKept(f"the head's momentum: {beside.name} has another shape than its weights")
        return {"momentum_buffer": value}
    state = read_weights(shard).get("state_optimizer")
    if not isinstance(state, dict):
        raise NotKept("the head's optimizer state: its files have none")
    numbers = _numbers(state, -1)
    if not numbers:
        raise NotKept("the head's optimizer state: it is damaged")
    return _moments(kind, state, numbers[-1], shape)


def _numbers(optimizer: dict[str, Any], group: int) -> list[Any]:
    """Return the numbers of the parameters in a group: the first is the backbone's, the last the head's."""
    groups = optimizer.get("param_groups")
    if not isinstance(groups, list) or not groups or not isinstance(groups[group], dict):
        return []
    numbers = groups[group].get("params")
    return numbers if isinstance(numbers, list) else []


def _moments(kind: str, optimizer: dict[str, Any], number: Any, shape: Sequence[int]) -> dict[str, Tensor]:
    """Return the moments of a parameter, for AdamW with its step.

    Raises:
        NotKept: there are none of this shape.
    """
    states = optimizer.get("state")
    state = states.get(number) if isinstance(states, dict) and isinstance(number, int) else None
    found: dict[str, Tensor] = {}
    for key in _MOMENTS[kind]:
        value = state.get(key) if isinstance(state, dict) else None
        if not _is_plain(value) or list(value.shape) != list(shape):
            raise NotKept(f"the optimizer state: the file has no {key} of shape {list(shape)}, as {kind} needs")
        found[key] = value
    if kind == "adamw":
        step = state.get("step") if isinstance(state, dict) else None
        if not _is_plain(step) or step.numel() != 1 or not 0 <= float(step) < 2**31:
            raise NotKept("the optimizer state: the file has no step, as adamw needs")
        found["step"] = step.reshape(())
    return found


def _is_plain(value: Any) -> TypeGuard[Tensor]:
    """Return True for a dense tensor of floating-point numbers, with its values."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
    )
