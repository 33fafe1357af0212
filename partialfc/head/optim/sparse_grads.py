"""Gradients that may be sparse: their values, their norm, whether they are finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def coalesced(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted unique rows [A] and their values [A, …] of a sparse gradient."""
    rows = gradient._indices()[0]
    # Autograd drops the mark that the rows are sorted and unique; looking costs far less than sorting values.
    if gradient.is_coalesced() or bool((rows[1:] > rows[:-1]).all()):
        return rows, gradient._values()
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()


def squared_norm(parameters: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Sum of the squares of all gradients that there are, [] float64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in _gradients(parameters):
        values = coalesced(gradient)[1] if gradient.is_sparse else gradient
        total += torch.linalg.vector_norm(values, dtype=torch.float64).square()
    return total


def all_finite(parameters: Iterable[Tensor | None], others: Iterable[Tensor], device: torch.device) -> Tensor:
    """Whether all gradients, and the ``others``, are free of NaN and Inf, [] bool. One pass, no copy, no wait for a
    device.
    """
    values = [gradient._values() if gradient.is_sparse else gradient for gradient in _gradients(parameters)]
    finite = torch.ones((), dtype=torch.bool, device=device)
    for value in (*values, *others):
        if value.numel():
            finite &= torch.linalg.vector_norm(value, math.inf).isfinite()
    return finite


def _gradients(parameters: Iterable[Tensor | None]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter is not None and parameter.grad is not None]
