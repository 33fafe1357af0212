"""Optimizers that touch only the rows that have a gradient: what they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from partialfc.errors import ConfigError
from partialfc.head.optim.rounding import round_stochastically
from partialfc.head.optim.sparse_grads import coalesced
from partialfc.head.random import stream_key

# Elements of a piece: on a CPU what its second-level cache holds, elsewhere enough to keep the device busy.
_CPU_PIECE, _GPU_PIECE = 1 << 17, 1 << 24
_ROUNDING = 4  # the purpose that tells this stream of random numbers from the others

Rows = slice | Tensor


class RowOptimizer(Optimizer):
    """Base of optimizers whose step works on the rows that have a gradient, a piece of them at a time.

    Subclasses say in :meth:`state_names` what they keep for a parameter and in :meth:`update` what a step does to some
    rows of it. Parameters and state may be float32, float64 or bfloat16; the arithmetic is in float32 (float64), and
    what is stored in bfloat16 is rounded stochastically. Sparse gradients are coalesced, dense ones are accepted.
    """

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
        """What is kept for each parameter of ``group``."""
        raise TypeError(f"{type(self).__name__} must define state_names()")

    def make_state(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """One of them at the start, with as many rows as ``parameter``; zeros of its shape in ``state_dtype``."""
        return torch.zeros_like(parameter, dtype=group["state_dtype"] or parameter.dtype)

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """One step on some rows, in place: ``weight [n, …]``, their ``gradient``, and the same rows of the state."""
        raise TypeError(f"{type(self).__name__} must define update()")

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
                    owed = getattr(parameter, "catch_up", None)
                    if owed is not None and getattr(owed, "optimizer", self) is not self:
                        owed(None)  # what an earlier optimizer still owed the rows
                        del parameter.catch_up
                    self.step_parameter(parameter, group)
        return loss

    def step_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """One step of one parameter that has a gradient."""
        assert parameter.grad is not None
        state = self.state_of(parameter, group)
        state["step"] += 1
        stored = {"weight": parameter, **{name: value for name, value in state.items() if name != "step"}}
        gradient = parameter.grad
        if parameter.dim() == 0:  # a single row
            stored, gradient = {name: value.view(1) for name, value in stored.items()}, gradient.view(1)
        work = WorkingRows(stored, stream_key(_ROUNDING, int(state["step"])))
        for rows, values in row_pieces(stored["weight"], gradient):
            copies = work.read(rows)
            weight = copies["weight"]
            others = {name: value for name, value in copies.items() if name != "weight"}
            self.update(weight, values.to(weight.dtype), others, group)
            work.write(rows, copies)

    def state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state; what is missing of it is made."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int64)
        for name in self.state_names(group):
            if name not in state:
                state[name] = self.make_state(name, parameter, group)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's, but state keeps the dtype in which it was saved, whatever the parameter's."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.to("cpu" if key == "step" else parameter.device, copy=True)


class WorkingRows:
    """Reads and writes rows of tensors that are stored in several dtypes, for arithmetic in float32 or float64.

    Args:
        stored: tensors of the same number of rows.
        key: of the random numbers for stochastic rounding.
    """

    def __init__(self, stored: dict[str, Tensor], key: int) -> None:
        self._stored, self._key = stored, key
        self._buffers: dict[str, Tensor] = {}

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """The rows, to be changed in place; views where ``rows`` is a slice and the dtype needs no conversion."""
        found = {}
        for name, tensor in self._stored.items():
            if isinstance(rows, slice):
                part = tensor[rows]
            else:
                buffer = self._buffers.get(name)
                if buffer is None or len(buffer) < len(rows):
                    buffer = self._buffers[name] = tensor.new_empty(len(rows), *tensor.shape[1:])
                part = torch.index_select(tensor, 0, rows, out=buffer[: len(rows)])
            found[name] = part.float() if tensor.dtype is torch.bfloat16 else part
        return found

    def write(self, rows: Rows, copies: dict[str, Tensor]) -> None:
        """Store what :meth:`read` gave for the same ``rows``."""
        for number, (name, tensor) in enumerate(self._stored.items()):
            values = copies[name]
            if tensor.dtype is torch.bfloat16:
                start, stop = (rows.start, rows.stop) if isinstance(rows, slice) else (0, 0)
                ids = torch.arange(start, stop, device=tensor.device) if isinstance(rows, slice) else rows
                values = round_stochastically(values, stream_key(self._key, number), ids)
            elif isinstance(rows, slice):
                continue  # changed in place
            if isinstance(rows, slice):
                tensor[rows] = values
            else:
                tensor.index_copy_(0, rows, values)


@dataclass
class RowPieces:
    """A gradient in pieces of rows: (rows, their gradient [n, …]).

    Rows come as a slice where the gradient covers all of them, else as indices. Work in such pieces stays in the cache
    and needs no memory of the parameter's size.
    """

    rows: Tensor | None  # [A] sorted and unique; None: all
    values: Tensor  # [A, …]
    rows_per_piece: int

    def __iter__(self) -> Iterator[tuple[Rows, Tensor]]:
        for start in range(0, len(self.values), self.rows_per_piece):
            piece = slice(start, min(start + self.rows_per_piece, len(self.values)))
            yield piece if self.rows is None else self.rows[piece], self.values[piece]


def row_pieces(parameter: Tensor, gradient: Tensor) -> RowPieces:
    """The ``gradient`` of ``parameter``, sparse or dense, a piece of rows at a time."""
    rows, values = coalesced(gradient) if gradient.is_sparse else (None, gradient)
    if rows is not None and len(rows) == len(parameter):
        rows = None
    return RowPieces(rows, values, rows_per_piece(parameter))


def rows_per_piece(parameter: Tensor) -> int:
    """How many rows of ``parameter`` to work on at once."""
    elements = math.prod(parameter.shape[1:])
    return max(1, (_CPU_PIECE if parameter.device.type == "cpu" else _GPU_PIECE) // max(1, elements))
