"""Values, norm and finiteness of gradients that may be sparse."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def coalesced(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sorted unique rows [A] of a sparse gradient and their values [A, …]."""
    rows = gradient._indices()[0]
    # Autograd drops the mark that the rows are sorted and unique; looking costs far less than sorting values.
    if gradient.is_coalesced() or bool((rows[1:] > rows[:-1]).all()):
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
    """Return a bool [], true if all gradients and the ``others`` are free of NaN and Inf.

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
