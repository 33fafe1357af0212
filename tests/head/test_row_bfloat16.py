"""Weights and state in bfloat16: stochastic rounding keeps in the mean what rounding to nearest loses."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from partialfc import CenterLoss, RowAdagrad, RowAdamW, RowSGD
from partialfc.head.optim.rounding import round_stochastically
from tests.harness.ranks import Ranks
from tests.harness.rows import CLASSES, small_batch, small_head, sparse


def test_stochastic_rounding_is_right_in_the_mean_and_leaves_exact_numbers_alone() -> None:
    rows = torch.arange(20_000)
    for value in (1.0 + 2**-11, -0.3, 1e-20, 3e38, -7.77):
        rounded = round_stochastically(torch.full((20_000, 3), value), 11, rows).double()
        below, above = rounded.min(), rounded.max()
        assert below <= value <= above
        assert len(rounded.unique()) == 2, "only the two neighbours"
        spacing = float(above - below)
        assert float(rounded.mean()) == pytest.approx(torch.tensor(value).item(), abs=5 * spacing / 60_000**0.5)
    exact = torch.tensor([[0.0, -0.0, 1.5, -2.0, math.inf, -math.inf, 3.3895e38]]).bfloat16().float()
    assert torch.equal(round_stochastically(exact, 3, torch.tensor([0])).float(), exact)
    assert bool(round_stochastically(torch.tensor([[math.nan]]), 3, torch.tensor([0])).isnan().all())
    assert not torch.equal(
        round_stochastically(torch.full((9, 9), 0.3), 1, torch.arange(9)),
        round_stochastically(torch.full((9, 9), 0.3), 2, torch.arange(9)),
    )


@pytest.mark.parametrize("kind", [RowSGD, RowAdamW, RowAdagrad])
def test_many_tiny_updates_of_bfloat16_weights_are_kept_in_the_mean(kind: Any) -> None:
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0}
    if kind is RowSGD:
        options |= {"momentum": 0.0, "lr": 1e-4}
    weight = torch.nn.Parameter(torch.ones(500, 4, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    reference = torch.nn.Parameter(torch.ones(500, 4, dtype=torch.float64))
    ours, theirs = kind([weight], **options), kind([reference], **options)
    nearest = torch.ones(500, 4, dtype=torch.bfloat16)
    rows = torch.arange(0, 500, 2)
    for _ in range(300):
        weight.grad = sparse(weight, rows, torch.ones(250, 4))
        reference.grad = sparse(reference, rows, torch.ones(250, 4, dtype=torch.float64))
        before = reference.detach().clone()
        ours.step()
        theirs.step()
        nearest += (reference.detach() - before).to(torch.bfloat16)
    moved = 1 - float(reference.detach()[0, 0])
    assert moved > 0.02
    mean = float(weight.detach()[rows].double().mean())
    assert 1 - mean == pytest.approx(moved, rel=0.1)
    assert bool((weight.detach()[1::2] == 1).all())
    if kind is RowSGD:
        assert bool((nearest == 1).all()), "rounding to nearest loses all of it"


def test_state_in_bfloat16_is_saved_and_loaded_unchanged() -> None:
    weight = torch.nn.Parameter(torch.randn(9, 4))
    for make in (
        lambda: RowSGD([weight], state_dtype=torch.bfloat16),
        lambda: RowAdamW([weight], state_dtype=torch.bfloat16),
    ):
        optimizer = make()
        weight.grad = sparse(weight, torch.tensor([1, 5]), torch.randn(2, 4))
        optimizer.step()
        other = make()
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        for key, value in optimizer.state[weight].items():
            assert other.state[weight][key].dtype == value.dtype
            assert torch.equal(other.state[weight][key], value)
        assert torch.bfloat16 in {value.dtype for value in optimizer.state[weight].values()}


def _bf16_head(group: dist.ProcessGroup | None, unsampled: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    head = small_head(weight_dtype=dtype, sample_rate=0.5, process_group=group)
    optimizer = RowSGD(head.parameters(), lr=0.02, state_dtype=dtype, unsampled_rows=unsampled)
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    curve = []
    for step in range(60):
        x, y = small_batch(step % 4)
        out = head(x.detach().tensor_split(world_size)[rank].requires_grad_(), y.tensor_split(world_size)[rank])
        out.loss.backward()
        assert head.weight.grad.dtype is torch.float32, "rows' gradients are not rounded"
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(out.loss))
    return {"curve": curve, "rows": head.rows(torch.arange(CLASSES))}


@pytest.mark.parametrize("unsampled", ["frozen", "decayed"])
def test_a_head_with_bfloat16_weights_learns_like_one_in_float32(ranks: Ranks, unsampled: str) -> None:
    results = ranks.run(3, _bf16_head, unsampled)
    assert results[0]["rows"].dtype is torch.bfloat16
    assert torch.equal(results[0]["rows"], results[2]["rows"])
    assert results[0]["curve"] == results[1]["curve"]
    in_float32 = _bf16_head(None, unsampled, torch.float32)["curve"]
    assert in_float32[-1] < 0.5 * in_float32[0]
    assert results[0]["curve"] == pytest.approx(in_float32, rel=0.1, abs=0.1)
    head = small_head(weight_dtype=torch.bfloat16, center_loss=CenterLoss())
    assert head.center_loss.centers.dtype is torch.float32
