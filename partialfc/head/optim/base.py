"""Base of the optimizers that update only the rows with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from partialfc.errors import ConfigError
from partialfc.head.optim.deferred_decay import settle_deferred_decay
from partialfc.head.optim.dense_twin import DenseTwin, check_state, own_group
from partialfc.head.optim.working_rows import WorkingRows, row_pieces
from partialfc.head.random import RandomStream, stream_key


class RowOptimizer(Optimizer):
    """Base of the optimizers that update the rows with a gradient, a piece at a time.

    Subclasses name a parameter's state in :meth:`state_names` and define a step on some of its rows in :meth:`update`.
    Parameters and state may be float32, float64 or bfloat16; the arithmetic is in float32 (float64), and
    bfloat16 is rounded stochastically when it is stored. Sparse gradients are coalesced; dense ones are accepted.
    """

    dense_twin: DenseTwin | None = None

    def __init__(self, params: Iterable[Any], **defaults: Any) -> None:
        if not defaults["lr"] >= 0:
            raise ConfigError(f"lr must be at least 0, got {defaults['lr']}")
        if not defaults["weight_decay"] >= 0:
            raise ConfigError(f"weight_decay must be at least 0, got {defaults['weight_decay']}")
        state_dtype = defaults.get("state_dtype")
        if state_dtype not in (None, torch.float32, torch.float64, torch.bfloat16):
            raise ConfigError(f"state_dtype must be torch.float32, torch.float64 or torch.bfloat16, got {state_dtype}")
        super().__init__(params, defaults)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the state tensors of each parameter of ``group``."""
        raise TypeError(f"{type(self).__name__} must define state_names()")

    def make_state(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return an initial state tensor, one row for each of ``parameter``: zeros of its shape in ``state_dtype``."""
        return torch.zeros_like(parameter, dtype=group["state_dtype"] or parameter.dtype)

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Take a step on some rows, in place: ``weight [n, …]``, their ``gradient``, and the same rows of the state."""
        raise TypeError(f"{type(self).__name__} must define update()")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows with a gradient; return the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_parameter(parameter, group)
        return loss

    def step_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Take a step on one parameter that has a gradient."""
        settle_deferred_decay(parameter)  # of an earlier optimizer
        self.update_rows(parameter, group)

    def update_rows(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Update the rows of ``parameter`` with a gradient, piece by piece."""
        assert parameter.grad is not None
        state = self.state_of(parameter, group)
        state["step"] += 1
        stored = {"weight": parameter, **{name: value for name, value in state.items() if name != "step"}}
        gradient = parameter.grad
        if parameter.dim() == 0:  # a single row
            stored, gradient = {name: value.view(1) for name, value in stored.items()}, gradient.view(1)
        work = WorkingRows(stored, stream_key(RandomStream.ROUNDING, int(state["step"])))
        for rows, values in row_pieces(stored["weight"], gradient):
            copies = work.read(rows)
            weight = copies["weight"]
            others = {name: value for name, value in copies.items() if name != "weight"}
            self.update(weight, values.to(weight.dtype), others, group)
            work.write(rows, copies)

    def state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of ``parameter``; create missing tensors."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int64)
        for name in self.state_names(group):
            if name not in state:
                state[name] = self.make_state(name, parameter, group)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load like any optimizer, but keep the dtype in which state was saved, whatever the parameter's.

        The state of :attr:`dense_twin` is taken over, with its settings.

        Raises:
            ConfigError: the state is of another optimizer or of other parameters, or has settings without an equal.
        """
        state_dict = self._own_state_dict(state_dict)
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.to("cpu" if key == "step" else parameter.device, copy=True)

    def take_over(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return a parameter's ``state`` of :attr:`dense_twin` as one of this optimizer."""
        raise TypeError(f"{type(self).__name__} must define take_over()")

    def _own_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check ``state_dict`` and return it as one of this optimizer."""
        name = type(self).__name__
        groups, states = [], dict(state_dict["state"])
        # Their numbers may differ: torch says so.
        for saved, current in zip(state_dict["param_groups"], self.param_groups, strict=False):
            group, of_twin = own_group(name, self.dense_twin, saved, current, self.defaults)
            groups.append(group)
            for key, parameter in zip(saved["params"], current["params"], strict=False):
                if key not in states:
                    continue
                like = torch.empty_like(parameter, device="meta")
                if of_twin:
                    states[key] = self.take_over(states[key], parameter, group)
                check_state(
                    name, states[key], {each: self.make_state(each, like, group) for each in self.state_names(group)}
                )
        return {**state_dict, "state": states, "param_groups": groups + state_dict["param_groups"][len(groups) :]}
