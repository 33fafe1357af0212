"""Rows of a parameter and of its optimizer state, a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from partialfc.head.optim.rounding import round_stochastically
from partialfc.head.optim.sparse_grads import coalesced, padding_of
from partialfc.head.random import stream_key

# Elements of a piece: on a CPU as many as its second-level cache holds, elsewhere enough to keep the device busy.
_CPU_PIECE, _GPU_PIECE = 1 << 17, 1 << 24

Rows = slice | Tensor


class WorkingRows:
    """Reads and writes rows of tensors stored in several dtypes, for arithmetic in float32 or float64.

    Args:
        stored: tensors with the same number of rows.
        key: of the random numbers for stochastic rounding.
    """

    def __init__(self, stored: dict[str, Tensor], key: int) -> None:
        self._stored, self._key = stored, key
        self._buffers: dict[str, Tensor] = {}

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """Return the rows, to be changed in place; views if ``rows`` is a slice and the dtype needs no conversion."""
        copies = {}
        for name, tensor in self._stored.items():
            if isinstance(rows, slice):
                part = tensor[rows]
            else:
                buffer = self._buffers.get(name)
                if buffer is None or len(buffer) < len(rows):
                    buffer = self._buffers[name] = tensor.new_empty(len(rows), *tensor.shape[1:])
                part = torch.index_select(tensor, 0, rows, out=buffer[: len(rows)])
            copies[name] = part.float() if tensor.dtype is torch.bfloat16 else part
        return copies

    def write(self, rows: Rows, copies: dict[str, Tensor]) -> None:
        """Store the result of :meth:`read` for the same ``rows``."""
        for number, (name, tensor) in enumerate(self._stored.items()):
            values = copies[name]
            if tensor.dtype is torch.bfloat16:
                ids = torch.arange(rows.start, rows.stop, device=tensor.device) if isinstance(rows, slice) else rows
                values = round_stochastically(values, stream_key(self._key, number), ids)
            elif isinstance(rows, slice):
                continue  # changed in place
            if isinstance(rows, slice):
                tensor[rows] = values
            else:
                tensor.index_copy_(0, rows, values)


def row_pieces(parameter: Tensor, gradient: Tensor) -> Iterator[tuple[Rows, Tensor]]:
    """Yield the ``gradient`` of ``parameter``, sparse or dense, in pieces of rows: (rows, their gradient [n, …]).

    Rows come as a slice where the gradient covers all of them, else as indices. Work in such pieces stays in the cache
    and needs no memory of the parameter's size. The last piece may hold a row repeatedly, with the same gradient.
    """
    rows, values = coalesced(gradient) if gradient.is_sparse else (None, gradient)
    if rows is not None and len(rows) == len(parameter):
        rows = None
    padding = padding_of(gradient) if gradient.is_sparse else None
    size, stop = rows_per_piece(parameter), len(values)
    if padding is not None:
        stop = padding.start // size * size
        if len(values) - stop > size:
            stop = padding.start
    for start in range(0, stop, size):
        piece = slice(start, min(start + size, stop))
        yield piece if rows is None else rows[piece], values[piece]
    if rows is not None and padding is not None:
        # Places left over repeat the last row. So that the order of writing does not matter, they get its gradient, and
        # stay in one piece with it, lest it be updated twice.
        places = torch.arange(stop, len(values), device=values.device)
        space = values.new_empty(max(size, len(places)) if stop else len(places), *values.shape[1:])
        last = torch.index_select(values, 0, torch.minimum(places, padding.used - 1), out=space[: len(places)])
        yield rows[stop:], last


def rows_per_piece(parameter: Tensor) -> int:
    """Return the number of rows of ``parameter`` per piece."""
    elements = math.prod(parameter.shape[1:])
    return max(1, (_CPU_PIECE if parameter.device.type == "cpu" else _GPU_PIECE) // max(1, elements))
