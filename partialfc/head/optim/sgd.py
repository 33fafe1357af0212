"""SGD on rows, and what it owes to the rows that have no gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from partialfc.errors import ConfigError
from partialfc.head.optim.base import RowOptimizer, WorkingRows, rows_per_piece
from partialfc.head.optim.deferred_decay import PendingDecay
from partialfc.head.optim.sparse_grads import coalesced
from partialfc.head.random import stream_key

_CATCHING_UP = 5  # the purpose that tells this stream of random numbers from the others

UnsampledRows = Literal["frozen", "decayed"]


class RowSGD(RowOptimizer):
    """SGD with momentum and weight decay on rows: ``v ← μ·v + g + λ·w; w ← w − lr·v``.

    Where every row has a gradient in every step this is ``torch.optim.SGD``. The others are

    - ``"frozen"``: left as they are, their momentum too; or
    - ``"decayed"``: they decay, and coast on their momentum, exactly as ``torch.optim.SGD`` would have it with dense
      gradients, but only when somebody looks. The optimizer gives the parameter a method ``catch_up(rows)`` (``None``:
      all rows) that brings rows up to date; the head calls it for the rows that it is about to use. 4 bytes a row.
      ``state_dict()`` of head and optimizer catch up first; who reads the parameter by other ways calls
      ``head.catch_up()`` before.

    Args:
        params: as for any torch optimizer.
        lr: learning rate; ≥ 0.
        momentum: μ in [0, 1).
        weight_decay: λ; ≥ 0.
        unsampled_rows: ``"frozen"`` or ``"decayed"``.
        nesterov: ``w ← w − lr·(g + λ·w + μ·v)``; needs a momentum.
        state_dtype: of the momentum; default: the parameter's.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        unsampled_rows: UnsampledRows = "frozen",
        nesterov: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum must lie in [0, 1), got {momentum}")
        if unsampled_rows not in get_args(UnsampledRows):
            raise ConfigError(f"unsampled_rows must be one of {get_args(UnsampledRows)}, got {unsampled_rows!r}")
        if nesterov and not momentum:
            raise ConfigError("nesterov needs a momentum > 0")
        self._pending: dict[Tensor, PendingDecay] = {}
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            unsampled_rows=unsampled_rows,
            nesterov=nesterov,
            state_dtype=state_dtype,
        )

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        velocity = state.get("momentum_buffer")
        if velocity is None:
            weight.mul_(1.0 - lr * decay).add_(gradient, alpha=-lr)
        elif group["nesterov"]:
            gradient = gradient.add(weight, alpha=decay)
            velocity.mul_(momentum).add_(gradient)
            weight.add_(gradient, alpha=-lr).add_(velocity, alpha=-lr * momentum)
        else:
            velocity.mul_(momentum).add_(gradient).add_(weight, alpha=decay)
            weight.add_(velocity, alpha=-lr)

    # --- rows without a gradient --------------------------------------------------------------------------------------

    def step_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        decayed = group["unsampled_rows"] == "decayed" and parameter.dim() > 0
        if not decayed or parameter.grad is None or not parameter.grad.is_sparse:
            self.catch_up(parameter, None)
            super().step_parameter(parameter, group)
            return
        rows, _ = coalesced(parameter.grad)
        self.catch_up(parameter, rows)
        super().step_parameter(parameter, group)
        if parameter not in self._pending:
            self._pending[parameter] = PendingDecay(len(parameter), parameter.device)
            parameter.catch_up = CatchUp(self, parameter)  # type: ignore[attr-defined]  # the head looks for it
        pending = self._pending[parameter]
        pending.add_step(_without_gradient(group))
        if len(rows) == len(parameter):
            pending.settle()
        else:
            pending.take(rows)  # these have had the step

    @torch.no_grad()
    def catch_up(self, parameter: Tensor, rows: Tensor | None) -> None:
        """Bring ``rows`` [n] int64 of ``parameter`` up to date; ``None``: all of them."""
        pending = self._pending.get(parameter)
        if pending is None or pending.is_empty():
            return
        everything = rows is None
        behind = torch.arange(len(parameter), device=parameter.device) if rows is None else rows
        if parameter.device.type == "cpu":  # elsewhere to look would be to wait for the device
            behind = pending.behind(behind)
        # `.data`: a backward that is still to come may hold the parameter, but not these rows of it.
        stored = {"weight": parameter.data}
        if "momentum_buffer" in self.state[parameter]:
            stored["velocity"] = self.state[parameter]["momentum_buffer"]
        work = WorkingRows(stored, stream_key(_CATCHING_UP, pending.total))
        piece = rows_per_piece(parameter)
        for start in range(0, len(behind), piece):
            some = behind[start : start + piece]
            _apply(pending.take(some), copies := work.read(some))
            work.write(some, copies)
        if everything:
            pending.settle()

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, after all rows of all parameters are brought up to date."""
        self.catch_up_all()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's. What rows still owe from before is settled first."""
        self.catch_up_all()
        super().load_state_dict(state_dict)

    def catch_up_all(self) -> None:
        """Bring all rows of all parameters up to date."""
        for parameter in self._pending:
            self.catch_up(parameter, None)

    def __getstate__(self) -> dict[str, Any]:
        self.catch_up_all()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pending = {}


class CatchUp:
    """What a parameter carries as ``parameter.catch_up``. Copied or pickled, there is nothing left to catch up with."""

    def __init__(self, optimizer: RowSGD, parameter: Tensor) -> None:
        self.optimizer, self._parameter = optimizer, parameter

    def __call__(self, rows: Tensor | None) -> None:
        self.optimizer.catch_up(self._parameter, rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing_to_catch_up_with, ()


def _nothing_to_catch_up_with() -> Any:
    return _do_nothing


def _do_nothing(rows: Tensor | None) -> None:
    pass


def _without_gradient(group: dict[str, Any]) -> Tensor:
    """What a step with these constants does to (weight, velocity) of a row with zero gradient, [2, 2] float64."""
    lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
    if group["nesterov"]:
        weight = (1.0 - lr * decay * (1.0 + momentum), -lr * momentum**2)
    else:
        weight = (1.0 - lr * decay, -lr * momentum)
    return torch.tensor([weight, (decay, momentum)], dtype=torch.float64)


def _apply(products: Tensor, copies: dict[str, Tensor]) -> None:
    """Multiply each row's (weight, velocity) by its matrix [n, 2, 2], in place."""
    weight, velocity = copies["weight"], copies.get("velocity")
    factors = products.to(weight.dtype).view(len(weight), 4, *[1] * (weight.dim() - 1))
    if velocity is None:
        weight.mul_(factors[:, 0])
        return
    velocity_after = velocity * factors[:, 3] + weight * factors[:, 2]
    weight.mul_(factors[:, 0]).add_(velocity * factors[:, 1])
    velocity.copy_(velocity_after)
