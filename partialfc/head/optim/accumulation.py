"""Sums of the sparse gradients of a step's micro-batches, where torch would append the rows of one to the other's.

On a CPU torch merges sorted rows itself. On a GPU it concatenates: memory and work would follow the sum of the micro-
batches' rows instead of their union, and to merge them later the host would have to wait for the size of the union.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from partialfc.head.optim.sparse_grads import is_known_sorted, mark_sorted, padding_of
from partialfc.head.padded_rows import ListSize, list_rows
from partialfc.head.transfers import host_waits_for


class Accumulator:
    """Adds each sparse gradient of a parameter to the one that it has, instead of torch.

    It holds what torch adds with, which holds the parameter: its owner must not be held by the parameter.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._node: Any = get_gradient_edge(parameter).node
        leaf = ref(parameter)

        def merge(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...] | None:
            parameter, new = leaf(), gradients[0]
            if torch.is_grad_enabled():
                return None  # create_graph=True: the sum has a history, which only torch can give it
            if parameter is None or parameter.grad is None or new is None:
                return None
            if not (parameter.grad.is_sparse and new.is_sparse):
                return None
            with torch.no_grad():
                total = add(parameter.grad, new)
            parameter.grad = None  # torch then takes what it is given
            return (total,)

        self._hook = self._node.register_prehook(merge)

    def adds_for(self, parameter: Tensor) -> bool:
        """Return True if it adds the gradients of ``parameter``: no longer once that has another device or dtype."""
        return get_gradient_edge(parameter).node is self._node

    def remove(self) -> None:
        """Leave the gradients to torch again."""
        self._hook.remove()


def torch_appends(parameter: Tensor) -> bool:
    """Return True if torch appends the rows of a second gradient of ``parameter`` to those of the first."""
    return host_waits_for(parameter.device)


def add(earlier: Tensor, new: Tensor) -> Tensor:
    """Return the sum of two sparse gradients of a parameter, its rows sorted; ``earlier`` may be overwritten.

    It waits for the device only if the gradients are of different random samples, or the shard has few classes.
    """
    first, second = padding_of(earlier), padding_of(new)
    sorted_rows = is_known_sorted(earlier) and is_known_sorted(new)
    if sorted_rows and not (first or second) and earlier._nnz() == new._nnz() == len(earlier):  # all rows
        earlier._values().add_(new._values())
        return earlier
    if first and second and first.sample == second.sample:
        places = earlier._nnz() + second.size.batch
        if places < len(earlier):
            size = ListSize(max(first.start, second.start), places, first.size.batch + second.size.batch)
            return _merge(earlier, new, size, first.sample)
    merged = (earlier + new).coalesce()
    mark_sorted(merged.indices())
    return merged


def _merge(earlier: Tensor, new: Tensor, size: ListSize, sample: object) -> Tensor:
    """Return the sum of two gradients whose rows, taken together, fit a list of this size."""
    chosen = torch.zeros(len(earlier), dtype=torch.bool, device=earlier.device)
    for gradient in (earlier, new):
        chosen.index_fill_(0, gradient._indices()[0], True)
    rows, padding = list_rows(chosen, size, sample)
    values = earlier._values().new_zeros(len(rows), *earlier.shape[1:])
    for gradient in (earlier, new):
        values.index_add_(0, torch.searchsorted(rows, gradient._indices()[0]), gradient._values())
    mark_sorted(rows, padding)
    return torch.sparse_coo_tensor(rows[None], values, earlier.shape, check_invariants=False)
