"""Optimizers that touch only the rows that have a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from partialfc.errors import ConfigError

_ROWS_PER_PIECE = 2048


class RowSGD(Optimizer):
    """SGD with momentum and weight decay on rows: ``v ← μ·v + g + λ·w; w ← w − lr·v``.

    A row without a gradient in a step is left as it is, its momentum too, and costs nothing. Where every row has a
    gradient in every step this is ``torch.optim.SGD``. Sparse gradients are coalesced, dense ones are accepted.

    Args:
        params: as for any torch optimizer.
        lr: learning rate; ≥ 0.
        momentum: μ in [0, 1).
        weight_decay: λ; ≥ 0.
        unsampled_rows: ``"frozen"``: rows without a gradient do not decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        unsampled_rows: str = "frozen",
    ) -> None:
        if not lr >= 0:
            raise ConfigError(f"lr must be at least 0, got {lr}")
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum must lie in [0, 1), got {momentum}")
        if not weight_decay >= 0:
            raise ConfigError(f"weight_decay must be at least 0, got {weight_decay}")
        if unsampled_rows != "frozen":
            raise ConfigError(f'unsampled_rows must be "frozen", got {unsampled_rows!r}')
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows that have a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, float(group["lr"]), group["momentum"], group["weight_decay"])
        return loss

    def _update(self, parameter: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        velocity = None
        if momentum:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            velocity = state["momentum_buffer"]
        for rows, gradient in row_pieces(parameter):
            if isinstance(rows, slice):  # in place
                weight, speed = parameter[rows], None if velocity is None else velocity[rows]
            else:
                weight = parameter.index_select(0, rows)
                speed = None if velocity is None else velocity.index_select(0, rows)
            change = gradient.to(weight.dtype)
            if weight_decay:
                change = change.add(weight, alpha=weight_decay)
            if speed is not None:
                change = speed.mul_(momentum).add_(change)
            weight.add_(change, alpha=-lr)
            if not isinstance(rows, slice):
                parameter.index_copy_(0, rows, weight)
                if velocity is not None and speed is not None:
                    velocity.index_copy_(0, rows, speed)


def row_pieces(parameter: Tensor) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """The gradient of ``parameter`` a piece of rows at a time: (rows, their gradient [n, …]).

    Rows come as a slice where the gradient covers all of them, else as indices. Work in such pieces stays in the cache
    and needs no memory of the parameter's size.
    """
    gradient = parameter.grad
    assert gradient is not None
    rows, values = None, gradient
    if gradient.is_sparse:
        rows, values = _coalesced(gradient)
        if len(rows) == len(parameter):
            rows = None
    for start in range(0, len(values), _ROWS_PER_PIECE):
        piece = slice(start, min(start + _ROWS_PER_PIECE, len(values)))
        yield piece if rows is None else rows[piece], values[piece]


def _coalesced(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted unique rows [A] and their values [A, …] of a sparse gradient."""
    rows = gradient._indices()[0]
    # Autograd drops the mark that the rows are sorted and unique; looking costs far less than sorting values.
    if gradient.is_coalesced() or bool((rows[1:] > rows[:-1]).all()):
        return rows, gradient._values()
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()
