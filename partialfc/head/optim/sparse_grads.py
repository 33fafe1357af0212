"""Values, norm and finiteness of gradients that may be sparse."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from partialfc.head.padded_rows import Padding

# Storages of row indices known to be sorted and unique up to their padding, by address. A weak reference keeps the
# address from being reused, but not the memory alive.
_sorted: dict[int, tuple[StorageWeakRef, Padding | None]] = {}


def mark_sorted(rows: Tensor, padding: Padding | None = None) -> None:
    """Remember that ``rows`` [A] int64, of a future sparse gradient, are sorted and, up to ``padding``, unique."""
    for address in [address for address, (storage, _) in _sorted.items() if storage.expired()]:
        del _sorted[address]
    storage = StorageWeakRef(rows.untyped_storage())
    _sorted[storage.cdata] = storage, padding


def is_known_sorted(gradient: Tensor) -> bool:
    """Return True if the rows of a sparse gradient are marked as sorted and, up to their padding, unique.

    Autograd drops torch's own mark, ``is_coalesced()``, from the gradient; :func:`mark_sorted` outlives it.
    """
    storage = StorageWeakRef(gradient._indices().untyped_storage())
    return gradient.is_coalesced() or storage.cdata in _sorted


def padding_of(gradient: Tensor) -> Padding | None:
    """Return the places of a sparse gradient that repeat its last row, with values of 0; None: there are none."""
    storage = StorageWeakRef(gradient._indices().untyped_storage())
    return _sorted[storage.cdata][1] if storage.cdata in _sorted else None


def coalesced(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sorted rows [A] of a sparse gradient, unique up to :func:`padding_of` it, and their values [A, …]."""
    rows = gradient._indices()[0]
    # If rows are not known to be sorted, looking costs far less than sorting values, but waits for the device.
    if is_known_sorted(gradient) or bool((rows[1:] > rows[:-1]).all()):
        return rows, gradient._values()
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()


def squared_norm(parameters: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Return the sum of the squares of all gradients present, [] float64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in _gradients(parameters):
        values = coalesced(gradient)[1] if gradient.is_sparse else gradient
        total += torch.linalg.vector_norm(values, dtype=torch.float64).square()
    return total


def all_finite(parameters: Iterable[Tensor | None], others: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return a bool []: True if all gradients and the ``others`` are free of NaN and Inf.

    Takes one pass and no copy, and does not wait for a device.
    """
    values = [gradient._values() if gradient.is_sparse else gradient for gradient in _gradients(parameters)]
    finite = torch.ones((), dtype=torch.bool, device=device)
    for value in (*values, *others):
        if value.numel():
            finite &= torch.linalg.vector_norm(value, math.inf).isfinite()
    return finite


def _gradients(parameters: Iterable[Tensor | None]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter is not None and parameter.grad is not None]
