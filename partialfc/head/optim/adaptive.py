"""Adaptive optimizers on rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from partialfc.errors import ConfigError
from partialfc.head.optim.base import RowOptimizer
from partialfc.head.optim.dense_twin import DenseTwin


class RowAdamW(RowOptimizer):
    """AdamW (Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101, algorithm 2) on rows.

    Rows without a gradient are unchanged. Bias correction counts each row's own steps. If every row has a gradient in
    every step, this is ``torch.optim.AdamW``.

    Args:
        params: as for any torch optimizer.
        lr: learning rate; ≥ 0.
        betas: decay of the two moments, in [0, 1).
        eps: > 0.
        weight_decay: λ of ``w ← w − lr·λ·w``; ≥ 0.
        state_dtype: of the moments; default: the parameter's dtype.

    Raises:
        ConfigError: an argument is out of its range.
    """

    dense_twin = DenseTwin(
        "torch.optim.AdamW",
        settings=frozenset({"betas", "eps", "amsgrad"}),
        neutral={"amsgrad": False, "maximize": False, "decoupled_weight_decay": True},
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ConfigError(f"betas must lie in [0, 1), got {betas}")
        if not eps > 0:
            raise ConfigError(f"eps must be positive, got {eps}")
        super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, state_dtype=state_dtype)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "row_steps")

    def make_state(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        if name == "row_steps":
            return torch.zeros(parameter.shape[:1], dtype=torch.int32, device=parameter.device)
        return super().make_state(name, parameter, group)

    def take_over(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        row_steps = self.make_state("row_steps", parameter, group).fill_(int(state["step"]))
        return {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"], "row_steps": row_steps}

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        mean, square, steps = state["exp_avg"], state["exp_avg_sq"], state["row_steps"].add_(1)
        mean.lerp_(gradient.to(mean.dtype), 1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        exponent = steps.double().view(-1, *[1] * (weight.dim() - 1))
        corrected = square / (1.0 - beta2**exponent).to(square.dtype)
        size = lr / (1.0 - beta1**exponent)
        weight.mul_(1.0 - lr * group["weight_decay"])
        weight.sub_(size.to(weight.dtype) * mean / corrected.sqrt_().add_(group["eps"]))


class RowAdagrad(RowOptimizer):
    """Row-wise Adagrad: one number per row, ``G ← G + mean(g²); w ← w − lr·g/(√G + ε)`` with ``g ← g + λ·w``.

    The optimizer with the least state, like FBGEMM's ``EXACT_ROWWISE_ADAGRAD`` (Duchi et al., JMLR 2011). Rows without
    a gradient are unchanged.

    Args:
        params: as for any torch optimizer.
        lr: learning rate; ≥ 0.
        eps: ε; > 0.
        weight_decay: λ; ≥ 0.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        if not eps > 0:
            raise ConfigError(f"eps must be positive, got {eps}")
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    def make_state(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return torch.zeros(parameter.shape[:1], dtype=dtype, device=parameter.device)

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            gradient = gradient.add(weight, alpha=group["weight_decay"])
        total = state["sum"].add_(gradient.flatten(1).square().mean(1) if gradient.dim() > 1 else gradient.square())
        size = float(group["lr"]) / total.sqrt().add_(group["eps"])
        weight.sub_(gradient * size.view(-1, *[1] * (weight.dim() - 1)))
