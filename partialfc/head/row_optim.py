"""Optimizers that touch only the rows that have a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from partialfc.errors import ConfigError

# Elements of a piece: on a CPU what its second-level cache holds, elsewhere enough to keep the device busy.
_CPU_PIECE, _GPU_PIECE = 1 << 17, 1 << 24


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

    def _update(self, parameter: Tensor, lr: float, momentum: float, decay: float) -> None:
        gradient = parameter.grad
        assert gradient is not None
        velocity = None
        if momentum:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            velocity = state["momentum_buffer"]
        if parameter.dim() == 0:  # a single row
            parameter, gradient = parameter.view(1), gradient.view(1)
            velocity = velocity if velocity is None else velocity.view(1)
        pieces = row_pieces(parameter, gradient)
        buffers = [torch.empty_like(parameter[: pieces.rows_per_piece]) for _ in range(2)]
        for rows, values in pieces:
            gradient = values.to(parameter.dtype)
            if isinstance(rows, slice):  # in place
                _sgd(parameter[rows], velocity if velocity is None else velocity[rows], gradient, lr, momentum, decay)
                continue
            weight = torch.index_select(parameter, 0, rows, out=buffers[0][: len(rows)])
            if velocity is None:
                _sgd(weight, None, gradient, lr, momentum, decay)
            else:
                speed = torch.index_select(velocity, 0, rows, out=buffers[1][: len(rows)])
                _sgd(weight, speed, gradient, lr, momentum, decay)
                velocity.index_copy_(0, rows, speed)
            parameter.index_copy_(0, rows, weight)


def _sgd(weight: Tensor, velocity: Tensor | None, gradient: Tensor, lr: float, momentum: float, decay: float) -> None:
    """One step on some rows, in place."""
    if velocity is None:
        weight.mul_(1.0 - lr * decay).add_(gradient, alpha=-lr)
    else:
        velocity.mul_(momentum).add_(gradient).add_(weight, alpha=decay)
        weight.add_(velocity, alpha=-lr)


@dataclass
class RowPieces:
    """A gradient in pieces of rows: (rows, their gradient [n, …]).

    Rows come as a slice where the gradient covers all of them, else as indices. Work in such pieces stays in the cache
    and needs no memory of the parameter's size.
    """

    rows: Tensor | None  # [A] sorted and unique; None: all
    values: Tensor  # [A, …]
    rows_per_piece: int

    def __iter__(self) -> Iterator[tuple[slice | Tensor, Tensor]]:
        for start in range(0, len(self.values), self.rows_per_piece):
            piece = slice(start, min(start + self.rows_per_piece, len(self.values)))
            yield piece if self.rows is None else self.rows[piece], self.values[piece]


def row_pieces(parameter: Tensor, gradient: Tensor) -> RowPieces:
    """The ``gradient`` of ``parameter``, sparse or dense, a piece of rows at a time."""
    rows, values = _coalesced(gradient) if gradient.is_sparse else (None, gradient)
    if rows is not None and len(rows) == len(parameter):
        rows = None
    elements = math.prod(parameter.shape[1:])
    on_cpu = parameter.device.type == "cpu"
    return RowPieces(rows, values, max(1, (_CPU_PIECE if on_cpu else _GPU_PIECE) // max(1, elements)))


def _coalesced(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted unique rows [A] and their values [A, …] of a sparse gradient."""
    rows = gradient._indices()[0]
    # Autograd drops the mark that the rows are sorted and unique; looking costs far less than sorting values.
    if gradient.is_coalesced() or bool((rows[1:] > rows[:-1]).all()):
        return rows, gradient._values()
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()
