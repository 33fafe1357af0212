"""Callbacks around the optimizer step, for modules that follow the optimizer of their weight.

The head's counter, its centers and its deferred errors follow the optimizer's step, whatever the optimizer's class. Two
hooks on all optimizers of the process make that possible; a head follows the optimizer that holds its weight.
"""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class StepListener(Protocol):
    """Listens to the steps of the optimizer that holds its ``weight``."""

    @property
    def weight(self) -> Tensor: ...

    def before_optimizer_step(self) -> None: ...

    def after_optimizer_step(self) -> None: ...


_listeners: WeakSet[Any] = WeakSet()
_hooks: list[Any] = []  # handles, once registered


def add_step_listener(listener: StepListener) -> None:
    """Call the two methods of ``listener`` around each step of the optimizer that holds its weight, from now on."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before))
        _hooks.append(register_optimizer_step_post_hook(_after))
    _listeners.add(listener)


def _listeners_of(optimizer: Optimizer) -> list[StepListener]:
    if not _listeners:
        return []
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [listener for listener in _listeners if id(listener.weight) in held]


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for listener in _listeners_of(optimizer):
        listener.before_optimizer_step()


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for listener in _listeners_of(optimizer):
        listener.after_optimizer_step()
