"""Lists of sampled rows with places left over: the same results, and no state changed by what is left over."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partialfc import CenterLoss, PartialFC, RowAdagrad, RowAdamW, RowSGD
from partialfc.head import padded_rows, step_state
from partialfc.head.optim import working_rows
from partialfc.head.optim.sparse_grads import mark_sorted, padding_of
from partialfc.head.padded_rows import ListSize, Padding, list_rows, list_size
from partialfc.head.softmax import sampling
from tests.harness.loss_cases import LOSSES, make_loss

CLASSES, DIM, BATCH, RATE = 6000, 8, 20, 0.4


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 12), st.integers(2, 20))
@settings(max_examples=50, deadline=None)
def test_a_list_holds_the_chosen_rows_then_repeats_the_last_and_tells_if_they_do_not_fit(
    chosen: list[bool], start: int, more: int
) -> None:
    size = ListSize(start, start + more, batch=0)
    rows, padding = list_rows(torch.tensor(chosen), size, "a sample")
    expected = [row for row, one in enumerate(chosen) if one]
    fits = start < len(expected) < size.places
    assert bool(padding.fits) == fits
    if fits:
        assert rows.tolist() == expected + [expected[-1]] * (size.places - len(expected))
        assert int(padding.used) == len(expected)
        assert padding.unused.tolist() == [place >= len(expected) for place in range(start, size.places)]


@pytest.mark.parametrize(("classes", "rate"), [(20_000, 0.1), (100_000, 0.05), (6000, 0.4), (10_000, 0.7)])
def test_a_sample_is_far_from_the_bounds_of_its_list(classes: int, rate: float) -> None:
    size = list_size(classes, rate, BATCH)
    assert size is not None
    sigma = math.sqrt(classes * rate * (1 - rate))
    assert size.start <= classes * rate - 10 * sigma
    assert size.places >= classes * rate + 10 * sigma + BATCH
    assert size.places <= 1.3 * classes * rate
    assert size.places < classes, "a list as long as the shard would be taken for all of its rows"


@pytest.mark.parametrize(("classes", "rate", "batch"), [(1500, 0.1, 24), (100_000, 0.1, 5000), (9000, 0.97, 500)])
def test_there_is_no_list_where_much_of_it_would_be_left_over(classes: int, rate: float, batch: int) -> None:
    assert list_size(classes, rate, batch) is None


def trained_head(loss: str = "arcface", **arguments: Any) -> PartialFC:
    arguments = {"weight_dtype": torch.float64, "sample_rate": RATE, "memory_budget_mb": 0.5} | arguments
    return PartialFC(CLASSES, DIM, make_loss(LOSSES[loss]), **arguments)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    labels[2] = CLASSES - 1  # the row that is repeated is a class of the batch
    return torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64).requires_grad_(), labels


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    return lambda yes: monkeypatch.setattr(sampling, "host_waits_for", lambda device: yes)


CASES = {
    "arcface": {},
    "softmax": {},
    "curricularface": {"filter_threshold": 0.3},
    "sub-center arcface": {"center_loss": True},
    "uce": {"correct_sampling": True},
    "label smoothing of magface": {"correct_sampling": True},
    "circle": {"sample_rate": lambda step: 0.4 + 0.1 * step},
}


@pytest.mark.parametrize("loss", CASES)
def test_places_left_over_change_no_result(padded: Callable[[bool], None], loss: str) -> None:
    def train(yes: bool) -> tuple[list[Tensor], list[int], int]:
        padded(yes)
        options: dict[str, Any] = dict(CASES[loss])
        if options.pop("center_loss", False):
            options["center_loss"] = CenterLoss()
        head = trained_head(loss, **options)
        optimizer = RowSGD(head.parameters(), lr=0.5, unsampled_rows="decayed")
        found, counts = [], []
        for step in range(3):
            x, labels = batch_of(step)
            out = head(x, labels)
            out.loss.backward()
            assert x.grad is not None
            found += [out.loss.detach(), x.grad, head.weight.grad.to_dense(), head.grad_norm()]
            counts.append(out.active_rows)
            places = head.weight.grad._nnz()
            optimizer.step()
            optimizer.zero_grad()
        return [*found, *(value.clone() for value in head.state_dict().values())], counts, places

    (mine, my_counts, my_places), (other, counts, places) = train(True), train(False)
    assert my_counts == counts
    assert my_places > places == counts[-1]
    for value, expected in zip(mine, other, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_a_list_too_short_for_its_rows_makes_the_loss_nan(
    padded: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    padded(True)
    monkeypatch.setattr(padded_rows, "_CERTAINTY", 1e-6)  # bounds at the expected number
    out = trained_head(seed=next(seed for seed in range(99) if _drawn(seed) > CLASSES * RATE + BATCH + 1))(*batch_of(0))
    assert out.loss.isnan()
    assert out.softmax_loss.isnan()


def _drawn(seed: int) -> int:
    return int(sampling._draw(0, CLASSES, RATE, seed, 0, torch.device("cpu"), spare=0).sum())


@pytest.mark.parametrize("micro_batches", [2, 5, 300])
def test_lists_of_micro_batches_merge_into_one_without_a_question_to_the_device(
    padded: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, micro_batches: int
) -> None:
    def accumulate(loss: str, yes: bool) -> PartialFC:
        padded(yes)
        monkeypatch.setattr(step_state, "torch_appends", lambda parameter: yes)
        head = trained_head(loss, memory_budget_mb=5)
        for number in range(micro_batches):
            head(*batch_of(number)).loss.backward()
        return head

    mine, other = accumulate("softmax", True), accumulate("softmax", False)
    for parameter, expected in ((mine.weight, other.weight), (mine.bias, other.bias)):
        torch.testing.assert_close(parameter.grad.to_dense(), expected.grad.to_dense(), rtol=1e-9, atol=1e-12)
    padding, places = padding_of(mine.weight.grad), mine.weight.grad._nnz()
    if micro_batches == 300:  # their classes could be all of the shard's
        assert padding is None
    else:
        assert padding is not None
        assert places == list_size(CLASSES, RATE, micro_batches * BATCH).places
    RowSGD(mine.parameters(), lr=0.5).step()
    RowSGD(other.parameters(), lr=0.5).step()
    torch.testing.assert_close(mine.weight, other.weight, rtol=1e-9, atol=1e-12)


ROWS = {
    "sgd": lambda weight: RowSGD([weight], lr=0.1, weight_decay=0.1),
    "sgd, decayed": lambda weight: RowSGD([weight], lr=0.1, unsampled_rows="decayed"),
    "adamw": lambda weight: RowAdamW([weight], lr=0.1),
    "adagrad": lambda weight: RowAdagrad([weight], lr=0.1, weight_decay=0.1),
}
FOREIGN = {
    "torch's sgd": lambda weight: torch.optim.SGD([weight], lr=0.1),
    "torch's sgd, momentum": lambda weight: torch.optim.SGD([weight], lr=0.1, momentum=0.9),
    "torch's adagrad": lambda weight: torch.optim.Adagrad([weight], lr=0.1),
    "torch's sparse adam": lambda weight: torch.optim.SparseAdam([weight], lr=0.1),
}


def gradient(weight: Tensor, step: int, left_over: int) -> Tensor:
    """Of the same ten rows, whatever is left over behind them."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randperm(len(weight), generator=generator)[:10].sort().values
    values = torch.randn(10, DIM, generator=generator)
    if left_over:
        rows = torch.cat((rows, rows[-1:].expand(left_over)))
        values = torch.cat((values, torch.zeros(left_over, DIM)))
        unused = torch.arange(7, 10 + left_over) >= 10
        mark_sorted(rows, Padding(ListSize(7, len(rows), 0), step, torch.tensor(10), unused, torch.tensor(True)))
    else:
        mark_sorted(rows)
    return torch.sparse_coo_tensor(rows[None], values, weight.shape, check_invariants=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_at_once", [3, 8, 100])
@pytest.mark.parametrize("name", ROWS)
def test_row_optimizers_update_the_repeated_row_once(
    monkeypatch: pytest.MonkeyPatch, name: str, rows_at_once: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(working_rows, "_CPU_PIECE", rows_at_once * DIM)

    def train(left_over: int) -> Tensor:
        weight = torch.nn.Parameter(torch.ones(40, DIM, dtype=dtype))
        weight.grad_dtype = torch.float32
        optimizer = ROWS[name](weight)
        for step in range(4):
            weight.grad = gradient(weight, step, left_over)
            optimizer.step()
        optimizer.state_dict()  # brings the decayed rows up to date
        return weight.detach()

    assert torch.equal(train(left_over=9), train(left_over=0))


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_optimizers_do_as_without_places_left_over(name: str) -> None:
    def train(left_over: int) -> Tensor:
        weight = torch.nn.Parameter(torch.ones(40, DIM))
        optimizer = FOREIGN[name](weight)
        for step in range(4):
            weight.grad = gradient(weight, step, left_over)
            optimizer.step()
        return weight.detach()

    assert torch.equal(train(left_over=9), train(left_over=0))
