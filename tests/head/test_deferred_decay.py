"""Rows without a gradient: decayed when they are used, to their values under dense SGD."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partialfc import CenterLoss, RowAdagrad, RowSGD
from partialfc.head.optim.deferred_decay import apply_deferred_decay, deferred_decay_of
from tests.harness.ranks import Ranks
from tests.harness.rows import CLASSES, small_batch, small_head, sparse


def decaying_run(
    dtype: torch.dtype,
    steps: int,
    nesterov: bool = False,
    momentum: float = 0.9,
    interrupt: int = 0,
    shape: Any = (40, 3),
) -> tuple[Tensor, Tensor, list[float]]:
    """Decayed rows beside torch.optim.SGD in float64; returns both weights, and errors on the way."""
    generator = torch.Generator().manual_seed(5)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    ours = [torch.nn.Parameter(value.to(dtype)) for value in start]
    dense = [torch.nn.Parameter(value.clone()) for value in start]
    constants = [{"lr": 0.1, "momentum": momentum, "weight_decay": 5e-3}, {"lr": 0.02, "weight_decay": 0.0}]

    def groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": [parameter], **group} for parameter, group in zip(parameters, constants, strict=True)]

    def make() -> RowSGD:
        return RowSGD(groups(ours), momentum=0.5 if momentum else 0.0, nesterov=nesterov, unsampled_rows="decayed")

    optimizer = make()
    theirs = torch.optim.SGD(groups(dense), momentum=0.5 if momentum else 0.0, nesterov=nesterov)
    errors = []
    for step in range(steps):
        factor = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.1 * (step % 7)
        for which, (parameter, reference) in enumerate(zip(ours, dense, strict=True)):
            for group, constant in (
                (optimizer.param_groups[which], constants),
                (theirs.param_groups[which], constants),
            ):
                group["lr"] = constant[which]["lr"] * factor
            rate = 1.0 if step == steps // 3 else 0.1
            rows = (torch.rand(shape[0], generator=generator) < rate).nonzero().flatten()
            if step > 20:
                rows = rows[rows != 7]  # one row that waits for the rest of the run
            values = torch.randn(len(rows), *shape[1:], generator=generator, dtype=torch.float64)
            apply_deferred_decay(parameter, rows)  # as the head does in its forward pass
            wait = (parameter.detach().double() - reference.detach())[rows].abs()
            errors.append(float(wait.max()) if len(rows) else 0.0)
            parameter.grad = sparse(parameter, rows, values.to(dtype))
            reference.grad = torch.zeros_like(reference).index_add_(0, rows, values)
        optimizer.step()
        theirs.step()
        if interrupt and step % interrupt == interrupt - 1:
            buffer = io.BytesIO()
            torch.save({"weights": [p.detach() for p in ours], "optimizer": optimizer.state_dict()}, buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
            ours = [torch.nn.Parameter(value) for value in saved["weights"]]
            optimizer = make()
            optimizer.load_state_dict(saved["optimizer"])
    optimizer.apply_deferred_decay()
    return torch.stack([p.detach() for p in ours]), torch.stack([p.detach() for p in dense]), errors


@pytest.mark.parametrize("interrupt", [0, 70])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)])
def test_decayed_rows_are_those_of_dense_sgd_whenever_they_are_read(
    momentum: float, nesterov: bool, interrupt: int
) -> None:
    ours, dense, errors = decaying_run(torch.float64, 500, nesterov, momentum, interrupt)
    assert max(errors) <= 1e-10
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-10)
    ours, dense, errors = decaying_run(torch.float32, 500, nesterov, momentum, interrupt)
    assert max(errors) <= 1e-5 * float(dense.abs().max())


def test_sub_centers_and_biases_decay_too() -> None:
    for shape in ((30, 2, 3), (30,)):
        ours, dense, _ = decaying_run(torch.float64, 100, shape=shape)
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-11)


def test_frozen_rows_would_have_been_something_else() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    frozen = RowSGD([weight], lr=0.1, weight_decay=0.1)
    for _ in range(5):
        weight.grad = sparse(weight, torch.tensor([1]), torch.zeros(1, 2))
        frozen.step()
    assert weight.detach()[[0, 2]].tolist() == [[1, 1], [1, 1]]
    assert deferred_decay_of(weight) is None


@settings(max_examples=50, deadline=None)
@given(
    touched=st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=90),
    lr=st.floats(0, 1),
    momentum=st.floats(0, 0.99),
    decay=st.floats(0, 0.5),
)
def test_deferred_decay_is_exact_for_any_pattern_of_rows_and_constants(
    touched: list[set[int]], lr: float, momentum: float, decay: float
) -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2))
    reference = torch.nn.Parameter(weight.detach().clone())
    ours = RowSGD([weight], lr, momentum, decay, unsampled_rows="decayed")
    theirs = torch.optim.SGD([reference], lr, momentum, weight_decay=decay)
    for step, rows in enumerate(touched):
        index = torch.tensor(sorted(rows), dtype=torch.int64)
        values = torch.full((len(index), 2), math.sin(step), dtype=torch.float64)
        weight.grad = sparse(weight, index, values)
        reference.grad = torch.zeros_like(reference).index_add_(0, index, values)
        ours.step()
        theirs.step()
    ours.apply_deferred_decay()
    torch.testing.assert_close(weight, reference, rtol=1e-9, atol=1e-11)


def _decayed_steps(group: dist.ProcessGroup, unsampled: str) -> dict[str, Any]:
    """Sampled training on this rank; at the end everything that can be read is read."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    head = small_head(
        sample_rate=0.2, weight_dtype=torch.float64, process_group=group, center_loss=CenterLoss(0.1), seed=1
    )
    optimizer = RowSGD(head.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01, unsampled_rows=unsampled)
    dense = torch.cat([head.weight.detach()]).clone().requires_grad_()
    theirs = torch.optim.SGD([dense], lr=0.3, momentum=0.9, weight_decay=0.01)
    for seed in range(30):
        x, y = small_batch(seed)
        mine = x.detach().double().tensor_split(world_size)[rank].requires_grad_()
        head(mine, y.tensor_split(world_size)[rank]).loss.backward()
        dense.grad = head.weight.grad.to_dense()
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
        ids = torch.tensor([seed % CLASSES, (3 * seed) % CLASSES])
        if unsampled == "decayed" and len(head.weight):
            local = ids - head.first_class
            own = (local >= 0) & (local < len(head.weight))
            torch.testing.assert_close(head.rows(ids)[own], dense.detach()[local[own]], rtol=1e-10, atol=1e-12)
        else:
            head.rows(ids)
    return {"saved": head.state_dict()["weight"], "dense": dense.detach()}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_head_applies_deferred_decay_to_rows_that_it_uses_returns_and_saves(ranks: Ranks, world_size: int) -> None:
    for result in ranks.run(world_size, _decayed_steps, "decayed"):
        torch.testing.assert_close(result["saved"], result["dense"], rtol=1e-10, atol=1e-12)
    frozen = ranks.run(world_size, _decayed_steps, "frozen")
    assert any(not torch.allclose(result["saved"], result["dense"]) for result in frozen), (
        "there is a difference to see"
    )


def test_deferred_decay_applied_between_forward_and_backward_disturbs_nobody() -> None:
    def run(evaluate: bool) -> Tensor:
        head = small_head(sample_rate=0.2)
        optimizer = RowSGD(head.parameters(), lr=0.5, unsampled_rows="decayed")
        for seed in range(6):
            first, second = (
                head(*small_batch(seed)),
                head(*small_batch(seed + 100)),
            )  # two forward passes, then both backward
            if evaluate:
                head.eval()
                head(*small_batch(3))  # all rows
                head.state_dict()
                head.train()
            (first.loss + second.loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        return head.state_dict()["weight"].clone()

    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-5)


def test_copied_and_loaded_heads_have_nothing_deferred() -> None:
    head = small_head(sample_rate=0.2)
    optimizer = RowSGD(head.parameters(), lr=0.5, weight_decay=0.1, unsampled_rows="decayed")
    for seed in range(4):
        head(*small_batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        before = other.weight.detach().clone()
        other.apply_deferred_decay()
        assert torch.equal(other.weight, before)
        assert torch.equal(before, head.weight)
    head(*small_batch(9)).loss.backward()
    optimizer.step()
    fresh = {name: torch.full_like(value, 2) for name, value in head.state_dict().items()}
    head(*small_batch(10)).loss.backward()
    optimizer.step()
    head.load_state_dict(fresh)
    head.apply_deferred_decay()
    assert torch.equal(head.weight.detach(), fresh["weight"]), (
        "decay deferred before loading does not fall on the loaded rows"
    )
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.param_groups[0]["unsampled_rows"] == "decayed"


def test_another_optimizer_takes_over_where_the_first_one_stands() -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2))
    reference = torch.nn.Parameter(weight.detach().clone())
    kinds: list[tuple[Any, Any]] = [
        (
            lambda p: RowSGD([p], 0.1, unsampled_rows="decayed"),
            lambda p: torch.optim.SGD([p], 0.1, 0.9, weight_decay=5e-4),
        ),
        (
            lambda p: RowSGD([p], 0.3, unsampled_rows="decayed"),
            lambda p: torch.optim.SGD([p], 0.3, 0.9, weight_decay=5e-4),
        ),
    ]
    for make, make_reference in kinds:
        ours, theirs = make(weight), make_reference(reference)
        for step in range(5):
            rows = torch.tensor([step, (step + 2) % 6]).sort().values
            weight.grad = sparse(weight, rows, torch.ones(2, 2, dtype=torch.float64))
            reference.grad = weight.grad.to_dense()
            ours.step()
            theirs.step()
    RowAdagrad([weight], lr=0.0).step()
    torch.testing.assert_close(weight, reference, rtol=1e-10, atol=1e-12)
    assert deferred_decay_of(weight) is None


@pytest.mark.parametrize(("first", "second"), [(0.9, 0.9), (0.0, 0.9), (0.9, 0.0)])
def test_decay_deferred_by_a_discarded_optimizer_is_still_applied(first: float, second: float) -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2))
    reference = torch.nn.Parameter(weight.detach().clone())
    for momentum in (first, second):
        ours = RowSGD([weight], 0.1, momentum, 0.1, unsampled_rows="decayed")
        theirs = torch.optim.SGD([reference], 0.1, momentum, weight_decay=0.1)
        for step in range(5):
            rows = torch.tensor([step])
            weight.grad = sparse(weight, rows, torch.ones(1, 2, dtype=torch.float64))
            reference.grad = weight.grad.to_dense()
            ours.step()
            theirs.step()
        del ours
        gc.collect()
    apply_deferred_decay(weight)
    torch.testing.assert_close(weight, reference, rtol=1e-10, atol=1e-12)


def test_a_record_of_deferred_decay_keeps_nothing_alive() -> None:
    weight = torch.nn.Parameter(torch.ones(6, 2))
    optimizer = RowSGD([weight], 0.1, unsampled_rows="decayed")
    weight.grad = sparse(weight, torch.tensor([1]), torch.ones(1, 2))
    optimizer.step()
    parameter, record = weakref.ref(weight), weakref.ref(deferred_decay_of(weight))
    del weight, optimizer
    gc.collect()
    assert parameter() is None
    assert record() is None


def test_a_skipped_step_decays_nothing() -> None:
    head = small_head(sample_rate=0.2)
    optimizer = RowSGD(head.parameters(), lr=0.5, weight_decay=0.1, unsampled_rows="decayed")
    for seed in range(3):
        head(*small_batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = head.state_dict()["weight"].clone()
    head(*small_batch(5)).loss.backward()
    optimizer.zero_grad()  # what a loss scaler does after an overflow
    head(*small_batch(6))
    assert int(head.step) == 4
    assert torch.equal(head.state_dict()["weight"], before)


def test_past_steps_are_kept_only_as_long_as_a_row_needs_them() -> None:
    weight = torch.nn.Parameter(torch.ones(200, 2))
    optimizer = RowSGD([weight], lr=0.1, unsampled_rows="decayed")
    generator = torch.Generator().manual_seed(0)
    lengths = []
    for _ in range(1500):
        rows = (torch.rand(200, generator=generator) < 0.2).nonzero().flatten()
        weight.grad = sparse(weight, rows, torch.zeros(len(rows), 2))
        optimizer.step()
        lengths.append(deferred_decay_of(weight).steps_kept)
    assert max(lengths) < 200, "about ln(200)/0.2 = 26 steps are needed"
