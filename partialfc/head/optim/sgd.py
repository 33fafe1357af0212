"""SGD on rows; rows without a gradient are frozen or decay."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from partialfc.errors import ConfigError
from partialfc.head.optim.base import RowOptimizer
from partialfc.head.optim.deferred_decay import apply_deferred_decay, start_deferred_decay
from partialfc.head.optim.dense_twin import DenseTwin
from partialfc.head.optim.sparse_grads import coalesced

UnsampledRows = Literal["frozen", "decayed"]


class RowSGD(RowOptimizer):
    """SGD with momentum and weight decay on rows: ``v ← μ·v + g + λ·w; w ← w − lr·v``.

    If every row has a gradient in every step, this is ``torch.optim.SGD``. Rows without a gradient are

    - ``"frozen"``: unchanged, momentum included; or
    - ``"decayed"``: they decay, and coast on their momentum, exactly as under ``torch.optim.SGD`` with dense gradients.
      The work is deferred until a row is read (4 bytes per row). The head applies it to the rows that it is about to
      use, and ``state_dict()`` of head and optimizer to all rows. Call ``head.apply_deferred_decay()`` before reading
      the parameter in other ways.

    Args:
        params: as for any torch optimizer.
        lr: learning rate; ≥ 0.
        momentum: μ in [0, 1).
        weight_decay: λ; ≥ 0.
        unsampled_rows: ``"frozen"`` or ``"decayed"``.
        nesterov: ``w ← w − lr·(g + λ·w + μ·v)``; needs a momentum.
        state_dtype: of the momentum buffer; default: the parameter's dtype.

    Raises:
        ConfigError: an argument is out of its range.
    """

    dense_twin = DenseTwin(
        "torch.optim.SGD",
        settings=frozenset({"momentum", "dampening", "nesterov"}),
        neutral={"dampening": 0, "maximize": False},
    )

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

    def take_over(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        velocity = state.get("momentum_buffer")
        if velocity is None:
            return {}
        return {"momentum_buffer": velocity.to_dense() if velocity.is_sparse else velocity}

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
        gradient = parameter.grad
        decayed = group["unsampled_rows"] == "decayed" and parameter.dim() > 0
        if not decayed or gradient is None or not gradient.is_sparse:
            super().step_parameter(parameter, group)
            return
        rows, _ = coalesced(gradient)
        velocity = self.state_of(parameter, group).get("momentum_buffer")
        deferred = start_deferred_decay(parameter)
        # Steps deferred by an earlier optimizer moved another velocity: they come first, on all rows.
        deferred.apply(parameter, rows if deferred.velocity is velocity else None)
        self.update_rows(parameter, group)
        deferred.record_step(_matrix_without_gradient(group), rows, velocity)

    def apply_deferred_decay(self) -> None:
        """Bring all rows of all parameters up to date."""
        for group in self.param_groups:
            for parameter in group["params"]:
                apply_deferred_decay(parameter)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, after bringing all rows of all parameters up to date."""
        self.apply_deferred_decay()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load like any optimizer, after applying the steps deferred before."""
        self.apply_deferred_decay()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self.apply_deferred_decay()
        return super().__getstate__()

    def catch_up_all(self) -> None:
        """Call :meth:`apply_deferred_decay` by its deprecated name."""
        warnings.warn("RowSGD.catch_up_all() is now apply_deferred_decay()", DeprecationWarning, stacklevel=2)
        self.apply_deferred_decay()


def _matrix_without_gradient(group: dict[str, Any]) -> Tensor:
    """Return the effect of a step on (weight, velocity) of a row with zero gradient, [2, 2] float64."""
    lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
    if group["nesterov"]:
        weight = (1.0 - lr * decay * (1.0 + momentum), -lr * momentum**2)
    else:
        weight = (1.0 - lr * decay, -lr * momentum)
    return torch.tensor([weight, (decay, momentum)], dtype=torch.float64, device="cpu")
