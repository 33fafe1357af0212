"""The sharded head against an independent dense float64 computation: values, gradients, center updates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from partialfc import CenterLoss, PartialFC, RowSGD, losses
from partialfc.head.random import normal_rows, stream_key
from tests.harness.dense_reference import (
    CenterTerm,
    Extras,
    Negatives,
    Spec,
    base_of,
    dense_head,
    relative_error,
    sub_centers_of,
)
from tests.harness.grids import pairwise
from tests.harness.loss_cases import LOSSES, make_loss
from tests.harness.ranks import Ranks

STATES = ["random", 0.3, 0.9, 0.98]


@dataclass
class Case:
    spec: Spec = field(default_factory=lambda: {"name": "arcface"})
    num_classes: int = 41
    dim: int = 24
    state: str | float = "random"
    dtype: torch.dtype = torch.float32
    batch: int = 12
    labels: Tensor | None = None
    local_counts: list[int] | None = None
    sample_rate: float = 1.0
    center: bool = True
    filter_threshold: float | None = None
    correct_sampling: bool = False
    memory_budget_mb: float = 256

    @property
    def has_bias(self) -> bool:
        base = base_of(self.spec)
        return base["name"] == "softmax" and base.get("bias", True)


def extras_of(case: Case) -> Extras:
    """Inputs of the loss besides cosines: a state as training leaves it, the step's draws, UCE's bias."""
    name = base_of(case.spec)["name"]
    state = {"curricularface": [0.3], "adaface": [7.0, 2.0]}.get(name)
    noise = torch.empty(case.batch, 1)
    positions = torch.arange(case.batch)
    normal_rows(stream_key(0, 3, 0), positions, 1, 1.0, noise)
    return Extras(
        None if state is None else torch.tensor(state, dtype=torch.float64),
        noise[:, 0].double() if name.startswith("elastic") else None,
        torch.tensor([8.5], dtype=torch.float64, requires_grad=True) if name == "uce" else None,
    )


def make_batch(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, labels, weight, bias, centers of the whole problem."""
    generator = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sub_centers = sub_centers_of(case.spec)
    shape = (case.num_classes, case.dim) if sub_centers is None else (case.num_classes, sub_centers, case.dim)
    weight = randn(*shape) * 0.3
    labels = torch.randint(0, case.num_classes, (case.batch,), generator=generator)
    if case.labels is not None:
        labels = case.labels
    embeddings = randn(len(labels), case.dim)
    if case.state != "random":
        own = torch.nn.functional.normalize(weight[labels.clamp(min=0)], dim=-1)
        if sub_centers is not None:
            own = own[torch.arange(len(own)), torch.arange(len(own)) % sub_centers]
        across = embeddings - (embeddings * own).sum(1, keepdim=True) * own
        cosine = float(case.state) - 0.02 * torch.rand(len(labels), 1, generator=generator, dtype=torch.float64)
        embeddings = cosine * own + (1 - cosine**2) ** 0.5 * torch.nn.functional.normalize(across)
    embeddings = embeddings * (2 + 10 * torch.rand(len(labels), 1, generator=generator, dtype=torch.float64))
    if base_of(case.spec)["name"] == "softmax":
        embeddings = embeddings / 4
    bias = randn(case.num_classes) * 0.1
    centers = randn(case.num_classes, case.dim)
    kind = case.dtype
    return embeddings.to(kind), labels, weight.to(kind), bias.to(kind), centers.to(kind)


def one_step(group: dist.ProcessGroup, case: Case) -> dict[str, Any]:
    """One step of the head on this rank, with everything that it computed."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    x, y, weight, bias, centers = make_batch(case)
    counts = case.local_counts or [len(part) for part in y.tensor_split(world_size)]
    head = PartialFC(
        case.num_classes,
        case.dim,
        make_loss(case.spec),
        sample_rate=case.sample_rate,
        center_loss=CenterLoss(weight=0.1, alpha=0.5) if case.center else None,
        filter_threshold=case.filter_threshold,
        correct_sampling=case.correct_sampling,
        weight_dtype=case.dtype,
        memory_budget_mb=case.memory_budget_mb,
        process_group=group,
    )
    shard = slice(*head.partition.range(rank))
    with torch.no_grad():
        head.weight.copy_(weight[shard])
        if head.bias is not None:
            head.bias.copy_(bias[shard])
        if head.center_loss is not None:
            head.center_loss.centers.copy_(centers[shard])
        extras, holder = extras_of(case), head.loss.stateful
        if extras.state is not None:
            holder.state.copy_(extras.state)
        if extras.bias is not None:
            holder.bias.copy_(extras.bias)
    optimizer = RowSGD(head.parameters(), lr=0.0)
    start = sum(counts[:rank])
    mine = x[start : start + counts[rank]].clone().requires_grad_()
    out = head(mine, y[start : start + counts[rank]])
    out.loss.backward()
    grad = head.weight.grad
    assert grad is not None
    assert grad.is_sparse
    optimizer.step()
    return {
        "out": out.__class__(out.loss.detach(), *list(vars(out).values())[1:]),
        "grad_embeddings": mine.grad / world_size,
        "rows": grad.coalesce().indices()[0] + head.first_class,
        "grad_weight": grad.to_dense(),
        "grad_bias": None if head.bias is None else head.bias.grad.to_dense(),
        "centers": None if head.center_loss is None else head.center_loss.centers,
        "state": holder.state,
        "grad_loss_bias": None if extras.bias is None else holder.bias.grad,
    }


def check(ranks: Ranks, world_size: int, case: Case, tolerance: float) -> list[dict[str, Any]]:
    """Run ``case`` and compare everything with the dense computation."""
    results = ranks.run(world_size, one_step, case)
    x, y, weight, bias, centers = make_batch(case)
    active = torch.zeros(case.num_classes, dtype=torch.bool)
    active[torch.cat([result["rows"] for result in results])] = True
    expected = dense_head(
        case.spec,
        x,
        y,
        weight,
        bias if case.has_bias else None,
        Negatives(active, case.filter_threshold, 1 / case.sample_rate if case.correct_sampling else 1.0),
        CenterTerm(centers if case.center else None, 0.1, 0.5),
        extras_of(case),
    )
    for rank, result in enumerate(results):
        out = result["out"]
        for name in ("loss", "softmax_loss", "center_loss", "target_cosine"):
            assert relative_error(getattr(out, name), getattr(expected, name)) <= tolerance, (rank, name)
        assert out.num_samples == int((y >= 0).sum())
        assert torch.equal(out.loss, results[0]["out"].loss), "ranks disagree about the loss"
        if expected.state is not None:
            assert relative_error(result["state"], expected.state) <= max(1e-6 * (case.dtype is torch.float32), 1e-12)
            assert torch.equal(result["state"], results[0]["state"]), "ranks disagree about the state"
        if expected.grad_loss_bias is not None:
            assert relative_error(result["grad_loss_bias"], expected.grad_loss_bias) <= max(tolerance, 1e-6)
            assert torch.equal(result["grad_loss_bias"], results[0]["grad_loss_bias"])

    def gathered(name: str) -> Tensor:
        return torch.cat([result[name] for result in results])

    assert relative_error(gathered("grad_embeddings"), expected.grad_embeddings) <= tolerance
    assert relative_error(gathered("grad_weight"), expected.grad_weight) <= tolerance
    if case.has_bias:
        assert relative_error(gathered("grad_bias"), expected.grad_bias) <= tolerance
    if case.center:
        assert relative_error(gathered("centers"), expected.centers) <= tolerance
    return results


@pytest.mark.parametrize(("name", "state", "world_size"), pairwise(list(LOSSES), STATES, [1, 2, 3, 4]))
def test_loss_gradients_and_centers_equal_a_dense_float64_computation(
    ranks: Ranks, name: str, state: str | float, world_size: int
) -> None:
    spec = LOSSES[name]
    # Rounding a cosine to float32 changes a logit by scale·6e-8: beyond scale 128 that alone is more than 1e-5.
    scale = make_loss(spec).scale
    check(ranks, world_size, Case(spec, state=state), tolerance=1e-5 if scale <= 128 else 1e-7 * scale)
    check(ranks, world_size, Case(spec, state=state, dtype=torch.float64), tolerance=1e-10)


@pytest.mark.parametrize(("name", "world_size"), pairwise(list(LOSSES), [2, 3, 4]))
def test_sampled_step_equals_a_dense_computation_over_the_sampled_classes(
    ranks: Ranks, name: str, world_size: int
) -> None:
    for correct in (False, True):
        spec = LOSSES[name]
        case = Case(spec, sample_rate=0.3, num_classes=200, state=0.5, correct_sampling=correct)
        results = check(ranks, world_size, case, tolerance=max(1e-5, 1e-7 * make_loss(spec).scale))
        rows = torch.cat([result["rows"] for result in results])
        assert 30 <= len(rows) <= 110, "about 60 of 200 classes, and the batch's own"
        assert [result["out"].active_rows for result in results] == [len(result["rows"]) for result in results]


@pytest.mark.parametrize(("name", "num_classes", "world_size"), pairwise(list(LOSSES), [1, 2, 3], [1, 2, 3, 4]))
def test_fewer_classes_than_ranks(ranks: Ranks, name: str, num_classes: int, world_size: int) -> None:
    tolerance = max(1e-5, 1e-7 * make_loss(LOSSES[name]).scale)
    check(ranks, world_size, Case(LOSSES[name], num_classes=num_classes, batch=8), tolerance)


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_positives_on_one_rank(ranks: Ranks, world_size: int) -> None:
    for owner_first in (True, False):
        labels = torch.arange(12) % 3 if owner_first else 40 - torch.arange(12) % 3
        for rate in (1.0, 0.2):
            check(ranks, world_size, Case(labels=labels, sample_rate=rate, state=0.3), tolerance=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ignored_samples_do_not_count(ranks: Ranks, world_size: int) -> None:
    labels = torch.tensor([-1, 3, 40, -1, 7, 7, -1, 0, 12, -1, -1, 1])
    check(ranks, world_size, Case(labels=labels), tolerance=1e-5)
    results = check(ranks, world_size, Case(labels=torch.full((12,), -1)), tolerance=1e-5)
    assert float(results[0]["out"].loss) == 0.0


@pytest.mark.parametrize("counts", [[5, 3], [1, 7], [8, 0], [0, 6], [3, 0, 4], [2, 5, 0, 1]])
def test_ranks_may_pass_batches_of_different_sizes(ranks: Ranks, counts: list[int]) -> None:
    check(ranks, len(counts), Case(batch=sum(counts), local_counts=counts), tolerance=1e-5)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", ["arcface", "arcface at scale 128", "softmax", "sub-center mv-am-softmax", "uce"])
def test_many_small_chunks_give_the_same_as_one(ranks: Ranks, name: str, world_size: int) -> None:
    tiny = 5 * 4 * (12 * 2 + 2 * 24) / 2**20  # about five rows a chunk
    for budget in (1e-6, tiny, 3 * tiny):
        for rate in (1.0, 0.5):
            case = Case(LOSSES[name], memory_budget_mb=budget, state=0.9, sample_rate=rate)
            check(ranks, world_size, case, tolerance=1e-5)


@pytest.mark.parametrize(("name", "world_size"), pairwise(list(LOSSES), [1, 2]))
def test_filtered_negatives_are_left_out_of_the_denominator(ranks: Ranks, name: str, world_size: int) -> None:
    spec = LOSSES[name]
    tolerance = max(1e-5, 1e-7 * make_loss(spec).scale)
    for threshold in (0.0, 0.2, -0.9):  # of the last, none is left
        check(ranks, world_size, Case(spec, filter_threshold=threshold, dim=8, state=0.3), tolerance)
        sampled = Case(spec, filter_threshold=threshold, dim=8, state=0.3, sample_rate=0.4, correct_sampling=True)
        check(ranks, world_size, sampled, tolerance)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("scale", [20.0, 128.0])
def test_a_loss_with_curved_negatives_is_differentiated_too(ranks: Ranks, scale: float, world_size: int) -> None:
    for rate in (1.0, 0.5):
        case = Case(
            {"name": "curved", "scale": scale}, state=0.3, sample_rate=rate, memory_budget_mb=0.01, center=False
        )
        results = ranks.run(world_size, _curved_step, case)
        x, y, weight, _, _ = make_batch(case)
        x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
        cosines = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(weight).T
        own = torch.nn.functional.one_hot(y, case.num_classes).bool()
        active = own.clone()
        active[:, torch.cat([result["rows"] for result in results])] = True
        logits = scale * torch.where(own, cosines, cosines + 0.4 * cosines.square()).masked_fill(~active, -torch.inf)
        torch.nn.functional.cross_entropy(logits, y).backward()
        for name, expected in (("grad_embeddings", x.grad), ("grad_weight", weight.grad)):
            assert relative_error(torch.cat([result[name] for result in results]), expected) <= 1e-5


class Curved(losses.NormFace):
    """NormFace whose negatives are not linear in their cosines."""

    def negative_logits(self, cosine: Tensor, samples: losses.Samples) -> Tensor:
        return self.scale * (cosine + 0.4 * cosine.square())

    def logit_bound(self) -> float:
        return 1.4 * self.scale


def _curved_step(group: dist.ProcessGroup, case: Case) -> dict[str, Any]:
    losses.BY_NAME["curved"] = Curved
    return one_step(group, case)
