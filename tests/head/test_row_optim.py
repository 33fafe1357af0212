"""Row optimizers: the result of dense training, at the cost of the rows with a gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from partialfc import ConfigError, RowAdagrad, RowAdamW, RowSGD
from partialfc.errors import DoubleBackward
from partialfc.head import step_state
from tests.harness.rows import small_batch, small_head, sparse


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01), (0.0, 0.1)])
def test_row_sgd_at_rate_one_is_torch_sgd(momentum: float, weight_decay: float) -> None:
    head = small_head(weight_dtype=torch.float64)
    dense = head.weight.detach().clone().requires_grad_()
    ours = RowSGD(head.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    theirs = torch.optim.SGD([dense], lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for seed in range(5):
        head(*small_batch(seed)).loss.backward()
        dense.grad = head.weight.grad.to_dense()
        ours.step()
        theirs.step()
        head.zero_grad()
        torch.testing.assert_close(head.weight.detach(), dense.detach(), rtol=1e-12, atol=1e-14)


def test_row_sgd_leaves_rows_without_a_gradient_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(6000, 3, dtype=torch.float64))
    optimizer = RowSGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    expected, velocity = weight.detach().clone(), torch.zeros(6000, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        rows = torch.randint(0, 6000, (3000,), generator=generator)  # unsorted, with repetitions: not coalesced
        values = torch.randn(3000, 3, generator=generator, dtype=torch.float64)
        weight.grad = torch.sparse_coo_tensor(rows[None], values, weight.shape, check_invariants=True)
        dense = torch.zeros_like(expected).index_add_(0, rows, values)
        touched = rows.unique()
        velocity[touched] = 0.9 * velocity[touched] + dense[touched] + 0.1 * expected[touched]
        expected[touched] -= 0.1 * velocity[touched]
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-13)


def test_row_sgd_accepts_dense_gradients_schedulers_and_state_dicts() -> None:
    weight = torch.nn.Parameter(torch.randn(7, 3, dtype=torch.float64))
    reference = torch.nn.Parameter(weight.detach().clone())
    ours = RowSGD([weight], lr=0.2, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD([reference], lr=0.2, momentum=0.9, weight_decay=0.01)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in (ours, theirs)]
    for step in range(6):
        weight.grad = torch.full_like(weight, float(step))
        reference.grad = weight.grad.clone()
        ours.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()
        if step == 3:
            saved = copy.deepcopy(ours.state_dict())
            ours = RowSGD([weight], lr=9.0)
            ours.load_state_dict(saved)
            schedules[0].optimizer = ours
    torch.testing.assert_close(weight, reference)


def test_row_sgd_updates_a_single_number() -> None:
    number = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = RowSGD([number], lr=0.5, momentum=0.0, weight_decay=0.0)
    number.grad = torch.tensor(0.5)
    optimizer.step()
    assert number.item() == 0.75


# --- adaptive ---------------------------------------------------------------------------------------------------------


def test_row_adamw_with_all_rows_is_torch_adamw() -> None:
    for shape in ((7, 3), (7,), (5, 2, 3)):
        weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
        reference = torch.nn.Parameter(weight.detach().clone())
        options: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
        ours, theirs = RowAdamW([weight], **options), torch.optim.AdamW([reference], **options)
        for step in range(8):
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            weight.grad = gradient if step % 2 else sparse(weight, torch.arange(shape[0]), gradient)
            reference.grad = gradient.clone()
            ours.step()
            theirs.step()
        torch.testing.assert_close(weight, reference, rtol=1e-11, atol=1e-12)


def test_a_rows_own_steps_correct_its_moments() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    singles = [torch.nn.Parameter(row.clone()) for row in weight.detach()]
    ours = RowAdamW([weight], lr=0.1)
    theirs = [torch.optim.AdamW([single], lr=0.1) for single in singles]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = (torch.rand(6, generator=generator) < 0.4).nonzero().flatten()
        values = torch.randn(len(rows), 4, generator=generator, dtype=torch.float64)
        weight.grad = sparse(weight, rows, values)
        ours.step()
        for row, value in zip(rows.tolist(), values, strict=True):
            singles[row].grad = value.clone()
            theirs[row].step()
    torch.testing.assert_close(weight.detach(), torch.stack([s.detach() for s in singles]), rtol=1e-10, atol=1e-12)


def test_row_adagrad_keeps_one_number_per_row() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    expected, total = weight.detach().clone(), torch.zeros(6, dtype=torch.float64)
    ours = RowAdagrad([weight], lr=0.1, eps=1e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        rows = (torch.rand(6, generator=generator) < 0.5).nonzero().flatten()
        values = torch.randn(len(rows), 4, generator=generator, dtype=torch.float64)
        weight.grad = sparse(weight, rows, values)
        ours.step()
        for row, value in zip(rows.tolist(), values, strict=True):
            gradient = value + 0.05 * expected[row]
            total[row] += (gradient**2).mean()
            expected[row] -= 0.1 * gradient / (total[row].sqrt() + 1e-3)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-11, atol=1e-12)
    assert ours.state[weight]["sum"].shape == (6,)


# --- as ordinary optimizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: RowSGD(p, lr=0.1),
        lambda p: RowSGD(p, lr=0.1, unsampled_rows="decayed"),
        lambda p: RowAdamW(p, lr=0.1),
        lambda p: RowAdagrad(p, lr=0.1),
    ],
)
def test_a_grad_scaler_unscales_and_skips(make: Callable[[Any], Any]) -> None:
    def run(scaled: bool) -> Tensor:
        head = small_head(sample_rate=0.5, on_nonfinite="propagate")
        optimizer = make(head.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000, enabled=scaled)
        for seed in range(5):
            x, y = small_batch(seed)
            if scaled and seed == 2:  # an overflow: the step is skipped, and taken again with the same negatives
                broken = torch.where(torch.arange(10)[:, None] == 3, torch.inf, x.detach()).requires_grad_()
                before = [value.clone() for value in head.state_dict().values()]
                scaler.scale(head(broken, y, step=seed).loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                head(x, y, step=seed)
                after = list(head.state_dict().values())
                assert torch.equal(after[0], before[0]), "the weight is unchanged"
            scaler.scale(head(x, y, step=seed).loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return head.state_dict()["weight"].clone()

    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-6)


def test_micro_batches_cost_the_union_of_their_rows() -> None:
    head = small_head(sample_rate=0.3)
    RowSGD(head.parameters())
    rows = set()
    for seed in range(4):
        head(*small_batch(seed)).loss.backward()
        rows |= set(head.weight.grad._indices()[0].tolist())
        assert head.weight.grad._nnz() == len(rows)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: RowSGD(p, lr=-1), "lr must be at least 0, got -1"),
        (lambda p: RowSGD(p, momentum=1.0), r"momentum must lie in \[0, 1\), got 1.0"),
        (
            lambda p: RowSGD(p, unsampled_rows="lazy"),
            r"unsampled_rows must be one of \('frozen', 'decayed'\), got 'lazy'",
        ),
        (lambda p: RowSGD(p, momentum=0.0, nesterov=True), "nesterov needs a momentum > 0"),
        (lambda p: RowSGD(p, state_dtype=torch.float16), "state_dtype must be .* got torch.float16"),
        (lambda p: RowAdamW(p, betas=(0.9, 1.0)), r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        (lambda p: RowAdamW(p, eps=0), "eps must be positive, got 0"),
        (lambda p: RowAdagrad(p, weight_decay=-0.1), "weight_decay must be at least 0, got -0.1"),
    ],
)
def test_wrong_constants_are_refused(make: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make([torch.nn.Parameter(torch.zeros(2, 2))])


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_gradients_of_micro_batches_are_merged_where_torch_would_append_them(
    monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    def accumulated() -> Tensor:
        head = small_head(sample_rate=rate)
        for seed in range(4):
            head(*small_batch(seed)).loss.backward()
        return head.weight.grad

    plain, coalesced = accumulated(), torch.Tensor.coalesce
    monkeypatch.setattr(step_state, "torch_appends", lambda parameter: True)
    added: list[int] = []
    monkeypatch.setattr(torch.Tensor, "coalesce", lambda self: added.append(self._nnz()) or coalesced(self))
    merged = accumulated()
    assert len(added) == (3 if rate < 1 else 0), "all rows add up in place"
    assert merged._nnz() == plain._nnz()
    torch.testing.assert_close(merged.to_dense(), plain.to_dense())


def test_a_sum_with_a_history_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_state, "torch_appends", lambda parameter: True)
    head = small_head(sample_rate=0.3)
    head(*small_batch(0)).loss.backward()
    head(*small_batch(1)).loss.backward(create_graph=True)
    assert head.weight.grad.requires_grad
    with pytest.raises(DoubleBackward):
        head.weight.grad.coalesce().values().sum().backward()
