"""State of torch's optimizers in the row optimizers: taken over, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from partialfc import ConfigError, RowAdagrad, RowAdamW, RowSGD
from tests.harness.rows import small_batch, small_head

ROWS, DIM, BEFORE, AFTER = 7, 3, 4, 5


def parameters() -> list[Tensor]:
    """A weight, a bias and a number."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, DIM), (ROWS,), ())
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def groups(mine: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": mine[:2]}, {"params": mine[2:], "weight_decay": 0.0, "initial_lr": 0.5}]


def train(steps: int, seed: int, *pairs: tuple[Optimizer, list[Tensor]]) -> None:
    """Take steps with the same dense gradients in every optimizer."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        gradients = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in parameters()]
        for optimizer, mine in pairs:
            for each, gradient in zip(mine, gradients, strict=True):
                each.grad = gradient.clone()
            optimizer.step()


@pytest.mark.parametrize("steps", [0, BEFORE])
@pytest.mark.parametrize(
    ("dense", "row", "settings", "own"),
    [
        (torch.optim.SGD, RowSGD, {"momentum": 0.9, "weight_decay": 0.01}, {}),
        (torch.optim.SGD, RowSGD, {"momentum": 0.9, "nesterov": True, "foreach": True}, {"unsampled_rows": "decayed"}),
        (torch.optim.SGD, RowSGD, {}, {}),
        (torch.optim.AdamW, RowAdamW, {"weight_decay": 0.1, "betas": (0.8, 0.9)}, {}),
        (torch.optim.AdamW, RowAdamW, {"foreach": True, "eps": 1e-4}, {}),
    ],
)
def test_training_goes_on_as_in_the_optimizer_of_torch(
    dense: Any, row: Any, settings: dict[str, Any], own: dict[str, Any], steps: int
) -> None:
    mine = parameters()
    optimizer = dense(groups(mine), lr=0.1, **settings)
    train(steps, 1, (optimizer, mine))
    others = [each.detach().clone().requires_grad_() for each in mine]
    loaded = row(groups(others), lr=0.7, **own)
    loaded.load_state_dict(optimizer.state_dict())
    train(AFTER, 2, (optimizer, mine), (loaded, others))
    for each, other in zip(mine, others, strict=True):
        torch.testing.assert_close(other, each, rtol=1e-12, atol=1e-12)
    assert loaded.param_groups[1]["initial_lr"] == 0.5
    again = row(groups(parameters()), lr=0.7)
    again.load_state_dict(loaded.state_dict())
    assert again.state_dict()["param_groups"] == loaded.state_dict()["param_groups"]


def test_the_sparse_momentum_of_torch_is_taken_over() -> None:
    heads = [small_head(sample_rate=1.0, weight_dtype=torch.float64) for _ in range(2)]
    dense, row = torch.optim.SGD(heads[0].parameters(), lr=0.1, momentum=0.9), RowSGD(heads[1].parameters(), lr=0.1)

    def step(head: Any, optimizer: Optimizer, seed: int) -> None:
        x, y = small_batch(seed)
        optimizer.zero_grad()
        head(x.double(), y).loss.backward()
        optimizer.step()

    step(heads[0], dense, 0)
    assert dense.state[heads[0].weight]["momentum_buffer"].is_sparse
    heads[1].load_state_dict(heads[0].state_dict())
    row.load_state_dict(dense.state_dict())
    for seed in (1, 2):
        step(heads[0], dense, seed)
        step(heads[1], row, seed)
    torch.testing.assert_close(heads[1].weight, heads[0].weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [0, BEFORE])
@pytest.mark.parametrize(
    ("saved", "settings", "row", "message"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}, RowSGD, "SGD with dampening=0.1"),
        (torch.optim.SGD, {"maximize": True}, RowSGD, "maximize=True"),
        (torch.optim.AdamW, {"amsgrad": True}, RowAdamW, "amsgrad=True"),
        (torch.optim.Adam, {"weight_decay": 0.1}, RowAdamW, "decoupled_weight_decay=False"),
        (torch.optim.RAdam, {}, RowAdamW, "RowAdamW loads its own state and that of torch.optim.AdamW; .* betas"),
        (torch.optim.AdamW, {}, RowSGD, "loads its own state and that of torch.optim.SGD; .* betas"),
        (torch.optim.RMSprop, {"momentum": 0.9}, RowSGD, "alpha"),
        (torch.optim.Adagrad, {}, RowAdagrad, "RowAdagrad loads its own state; .* lr_decay"),
        (RowSGD, {}, RowAdagrad, "momentum"),
        (RowAdamW, {}, RowAdagrad, "betas"),
        (RowAdagrad, {}, RowAdamW, "another|settings eps, initial_lr, lr|settings eps, lr"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(
    saved: Any, settings: dict[str, Any], row: Any, message: str, steps: int
) -> None:
    mine = parameters()
    optimizer = saved(groups(mine), lr=0.1, **settings)
    train(steps, 1, (optimizer, mine))
    loading = row(groups(parameters()), lr=0.7)
    before = loading.state_dict()
    with pytest.raises(ConfigError, match=message):
        loading.load_state_dict(optimizer.state_dict())
    assert loading.state_dict() == before


@pytest.mark.parametrize(("dense", "row"), [(torch.optim.AdamW, RowAdamW), (RowAdamW, RowAdamW), (RowSGD, RowSGD)])
def test_the_state_of_other_rows_is_refused(dense: Any, row: Any) -> None:
    mine = parameters()
    optimizer = dense([mine[0]], lr=0.1)
    mine[0].grad = torch.ones_like(mine[0])
    optimizer.step()
    shard = torch.zeros(ROWS - 1, DIM, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ConfigError, match=rf"shape \[{ROWS}, {DIM}\], expected \[{ROWS - 1}, {DIM}\]"):
        row([shard]).load_state_dict(optimizer.state_dict())
