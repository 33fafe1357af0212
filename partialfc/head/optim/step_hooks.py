"""Callbacks around a step, for modules that follow the gradient and the optimizer of a parameter.

The head's counter, its centers and its deferred errors follow the optimizer's step, whatever the optimizer's class. Two
hooks on all optimizers of the process make that possible; a head listens to those that hold what it follows. A third
kind of hook, one a parameter, tells that a backward has added to the parameter's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary


class StepListener(Protocol):
    """Listens to the steps of the optimizers that hold any of ``followed``."""

    @property
    def followed(self) -> Sequence[Tensor]: ...

    def before_optimizer_step(self) -> None: ...

    def after_optimizer_step(self) -> None: ...

    def after_accumulation(self, leaf: Tensor) -> None: ...


_listeners: WeakSet[Any] = WeakSet()
_listeners_by_leaf = WeakTensorKeyDictionary()  # a WeakSet each
_hooks: list[Any] = []  # handles, once registered


def add_step_listener(listener: StepListener) -> None:
    """Tell ``listener`` of each step of the optimizers that hold what it follows, from now on."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before))
        _hooks.append(register_optimizer_step_post_hook(_after))
    _listeners.add(listener)


def add_accumulation_listener(listener: StepListener, leaf: Tensor) -> None:
    """Tell ``listener`` of each backward that has added to the gradient of ``leaf``, from now on."""
    listeners = _listeners_by_leaf.get(leaf)
    if listeners is None:
        listeners = _listeners_by_leaf[leaf] = WeakSet()
        leaf.register_post_accumulate_grad_hook(_accumulated)
    listeners.add(listener)


def current_backward() -> int | None:
    """Return the number of the backward that is calling; None outside of any."""
    number: int = torch._C._current_graph_task_id()
    return None if number < 0 else number


def _accumulated(leaf: Tensor) -> None:
    for listener in list(_listeners_by_leaf.get(leaf, ())):
        listener.after_accumulation(leaf)


def _listeners_of(optimizer: Optimizer) -> list[StepListener]:
    if not _listeners:
        return []
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [listener for listener in _listeners if any(id(leaf) in held for leaf in listener.followed)]


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for listener in _listeners_of(optimizer):
        listener.before_optimizer_step()


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for listener in _listeners_of(optimizer):
        listener.after_optimizer_step()
