"""Sums of sparse gradients that the head forms itself: whatever happens, nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from partialfc.head.optim import accumulation
from partialfc.head.optim.accumulation import Accumulator
from partialfc.head.sample_rate import DelayedRate, LinearRate, largest_rate


class SparseGrad(torch.autograd.Function):
    """A number whose gradient by the weight has some rows of ones, or is undefined."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: list[int] | None) -> Tensor:
        ctx.rows, ctx.shape = rows, weight.shape
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if ctx.rows is None:
            return None, None
        ones = grad.new_ones(len(ctx.rows), ctx.shape[1])
        return torch.sparse_coo_tensor(torch.tensor([ctx.rows]), ones, ctx.shape, check_invariants=True), None


def backward(weight: Tensor, rows: list[int] | None) -> None:
    SparseGrad.apply(weight, rows).backward()


@pytest.fixture
def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(9, 2))


def test_a_sum_is_sorted_and_no_row_occurs_twice(weight: torch.nn.Parameter) -> None:
    accumulator = Accumulator(weight)
    for rows in ([1, 4], None, [0, 4, 8]):
        backward(weight, rows)
    assert weight.grad is not None
    assert weight.grad._indices()[0].tolist() == [0, 1, 4, 8]
    assert weight.grad.to_dense()[:, 0].tolist() == [1, 1, 0, 0, 2, 0, 0, 0, 1]
    accumulator.remove()
    backward(weight, [4])
    assert weight.grad.to_dense()[4].tolist() == [3, 3], "torch adds again"


def test_a_sum_that_fails_leaves_what_there_was(weight: torch.nn.Parameter, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = Accumulator(weight)
    backward(weight, [1, 4])

    def fail(earlier: Tensor, new: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(accumulation, "add", fail)
    with pytest.raises(torch.OutOfMemoryError):
        backward(weight, [0])
    assert weight.grad is not None
    assert weight.grad.to_dense()[:, 0].nonzero()[:, 0].tolist() == [1, 4]
    assert accumulator.adds_for(weight)


def test_a_parameter_that_has_moved_needs_another_accumulator(weight: torch.nn.Parameter) -> None:
    accumulator = Accumulator(weight)
    assert accumulator.adds_for(weight)
    weight.data = weight.data.double()
    assert not accumulator.adds_for(weight)
    assert Accumulator(weight).adds_for(weight)


def test_a_delayed_rate_has_no_largest_that_its_rate_does_not_have() -> None:
    assert largest_rate(DelayedRate(LinearRate(0.1, 0.4, 10), -5), unknown=0.0) == 0.4
    assert largest_rate(DelayedRate(lambda step: 0.1, 3), unknown=0.0) == 0.0
    assert largest_rate(DelayedRate(lambda step: 0.1, 3)) == 1.0
