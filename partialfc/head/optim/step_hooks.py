"""How a head learns that an optimizer has stepped.

The head's counter, its centers and its deferred errors follow the optimizer's step, whatever the optimizer's class. Two
hooks on all optimizers of the process do that; a head follows the optimizer that holds its weight.
"""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Follower(Protocol):
    """A module that follows the optimizer of its ``weight``."""

    weight: nn.Parameter

    def before_optimizer_step(self) -> None: ...

    def after_optimizer_step(self) -> None: ...


_followers: WeakSet[Any] = WeakSet()


def follow(head: Follower) -> None:
    """From now on call ``head``'s two methods around each step of the optimizer that holds ``head.weight``."""
    if not _hooks_installed:
        _hooks_installed.append(register_optimizer_step_pre_hook(_before))
        _hooks_installed.append(register_optimizer_step_post_hook(_after))
    _followers.add(head)


_hooks_installed: list[Any] = []


def _heads_of(optimizer: Optimizer) -> list[Follower]:
    if not _followers:
        return []
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [head for head in _followers if id(head.weight) in held]


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for head in _heads_of(optimizer):
        head.before_optimizer_step()


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for head in _heads_of(optimizer):
        head.after_optimizer_step()
