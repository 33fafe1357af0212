"""The same run at any world size, and what a step costs: collectives, memory, rows."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from partialfc import CenterLoss, ClassPartition, PartialFC, RowSGD, losses
from partialfc.head.ownership import OwnedSamples
from partialfc.head.softmax import sampling
from tests.harness.dense_reference import Spec, base_of
from tests.harness.loss_cases import LOSSES, make_loss
from tests.harness.ranks import Ranks


def train(group: dist.ProcessGroup, sample_rate: float, steps: int, name: str = "arcface") -> dict[str, Any]:
    """A small network and head trained on a made-up problem; the global batch does not depend on the world size."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    num_classes, batch = 301, 24
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 20))
    head = PartialFC(
        num_classes,
        20,
        make_loss(LEARNING[name]),
        sample_rate=sample_rate,
        seed=5,
        center_loss=CenterLoss(0.01),
        process_group=group,
    )
    optimizer = RowSGD(head.parameters(), lr=0.05)
    backbone_optimizer = torch.optim.SGD(backbone.parameters(), lr=0.02, momentum=0.9)
    prototypes = torch.randn(num_classes, 16, generator=torch.Generator().manual_seed(1))
    curve, active = [], []
    per_rank = -(-batch // world_size)
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 + step)
        labels = torch.randint(0, 40, (batch,), generator=generator)  # few classes: their rows meet again
        inputs = prototypes[labels] + 0.1 * torch.randn(batch, 16, generator=generator)
        mine = slice(min(batch, rank * per_rank), min(batch, (rank + 1) * per_rank))
        out = head(backbone(inputs[mine]), labels[mine])
        out.loss.backward()
        for parameter in backbone.parameters():  # what DDP does
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= world_size
        backbone_optimizer.step()
        optimizer.step()
        backbone_optimizer.zero_grad()
        optimizer.zero_grad()
        curve.append(out.loss.item())
        active.append(out.active_rows)
    return {"curve": curve, "active": active, "weight": head.weight.detach(), "centers": head.center_loss.centers}


LEARNING: dict[str, Spec] = {
    "arcface": {"name": "arcface", "scale": 16.0},
    "softmax": {"name": "softmax"},
    "sub-center curricularface": {"name": "subcenter", "loss": {"name": "curricularface", "scale": 16.0}},
    "adaface": {"name": "adaface", "scale": 16.0},
    "magface": {"name": "magface", "scale": 16.0},
    "elasticface-arc+": {"name": "elastic_arcface", "scale": 16.0, "std": 0.1, "plus": True},
    "uce": {"name": "uce", "scale": 16.0},
    "label smoothing": {"name": "label_smoothing", "loss": {"name": "softmax"}},
}


@pytest.mark.parametrize(("sample_rate", "name"), [(1.0, "arcface"), *((0.3, name) for name in LEARNING)])
def test_one_to_four_ranks_follow_the_same_loss_curve(ranks: Ranks, sample_rate: float, name: str) -> None:
    runs = {size: ranks.run(size, train, sample_rate, 30, name) for size in (1, 2, 3, 4)}
    alone = runs[1][0]
    assert alone["curve"][-1] < 0.95 * alone["curve"][0], "the run must learn for the comparison to mean something"
    for world_size, results in runs.items():
        for result in results:
            assert result["curve"] == pytest.approx(alone["curve"], rel=1e-4), world_size
        active = [sum(counts) for counts in zip(*(result["active"] for result in results), strict=True)]
        assert active == alone["active"], "the same classes take part"
        weight = torch.cat([result["weight"] for result in results])
        torch.testing.assert_close(weight, alone["weight"], rtol=1e-3, atol=1e-5)
        centers = torch.cat([result["centers"] for result in results])
        torch.testing.assert_close(centers, alone["centers"], rtol=1e-3, atol=1e-5)


def count_collectives(group: dist.ProcessGroup, num_classes: int, dim: int, name: str) -> list[tuple[str, int]]:
    """Names and sizes in bytes of the collectives of one training step, the first one left out."""
    calls: list[tuple[str, int]] = []
    originals = {}

    def recorded(operation: str) -> Any:
        def call(*tensors: Any, **options: Any) -> Any:
            calls.append((operation, sum(t.numel() * t.element_size() for t in tensors[:1])))
            return originals[operation](*tensors, **options)

        return call

    head = PartialFC(num_classes, dim, make_loss(LOSSES[name]), center_loss=CenterLoss(), process_group=group)
    optimizer = RowSGD(head.parameters())
    operations = [o for o in dir(dist) if o.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "barrier"))]
    for step in range(2):
        if step == 1:
            for operation in operations:
                if callable(getattr(dist, operation)):
                    originals[operation] = getattr(dist, operation)
                    setattr(dist, operation, recorded(operation))
        try:
            head(torch.randn(6, dim, requires_grad=True), torch.randint(0, num_classes, (6,))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            for operation, original in originals.items():
                setattr(dist, operation, original)
    return calls


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_takes_three_collectives_whose_sizes_ignore_the_classes(ranks: Ranks, name: str) -> None:
    few = ranks.run(3, count_collectives, 10, 16, name)
    many = ranks.run(3, count_collectives, 5000, 16, name)
    assert few == many
    base = base_of(LOSSES[name])["name"]
    # One more where the targets' cosines are needed first, and one where logits may exceed 660.
    cosines_first = base in ("curricularface", "mv_am_softmax")
    maximum_first = base == "softmax" or "700" in name or "512" in name
    assert len(few[0]) == 3 + cosines_first + maximum_first, few[0]
    assert few[0] == few[1] == few[2]
    statistics = {world_size: ranks.run(world_size, count_collectives, 10, 16, name)[0] for world_size in (2, 3)}
    reduced = {size: [b for o, b in calls if o == "all_reduce"][-1] for size, calls in statistics.items()}
    # The negatives' sum, the target's logit and cosine, the distance to its center; what some losses add to that.
    columns = 4 + (base == "uce") + 2 * name.startswith("label smoothing")
    assert reduced == {2: 12 * columns * 8, 3: 18 * columns * 8}, "B·k·8 bytes: only the batch counts"


MEMORY = """
import torch, resource, sys
torch.set_num_threads(1)
from partialfc import PartialFC, RowSGD, losses
classes, dim, batch, rate, budget = 200_000, int(sys.argv[3]), 256, float(sys.argv[1]), float(sys.argv[2])

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024

head = PartialFC(classes, dim, losses.ArcFace(), sample_rate=rate, memory_budget_mb=budget)
optimizer = RowSGD(head.parameters())
x, y = torch.randn(batch, dim, requires_grad=True), torch.randint(0, classes, (batch,))
# Make the momentum resident and warm up the libraries, so that only the step itself is seen below.
optimizer.state[head.weight]["momentum_buffer"] = torch.full_like(head.weight, 1e-9)
small = PartialFC(2000, dim, losses.ArcFace(), memory_budget_mb=budget)
small(x, y % 2000).loss.backward(); RowSGD(small.parameters()).step(); del small; x.grad = None
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = resident()
out = head(x, y); out.loss.backward(); optimizer.step(); optimizer.zero_grad()
copies = 1 if rate == 1.0 else 2  # the gradient's values, and where rows are gathered a copy of them
print(peak() - before, copies * out.active_rows * dim * 4 + budget * 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("rate", "budget", "dim"),
    [
        (0.1, 16, 128),
        (1.0, 256, 64),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1.0, 32, 64), (0.01, 8, 128))),
    ],
)
def test_peak_memory_of_a_step_at_200k_classes_stays_within_its_bound(rate: float, budget: float, dim: int) -> None:
    command = [sys.executable, "-c", MEMORY, str(rate), str(budget), str(dim)]
    extra, bound = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert extra <= bound + 2**21, f"{extra / 2**20:.1f} MiB used, {bound / 2**20:.1f} MiB allowed"
    assert extra > 2**18, "a step that uses nothing was not measured"


def test_partition_is_that_of_torch_chunk() -> None:
    for num_classes in (1, 2, 5, 8, 41, 100):
        for world_size in (1, 2, 3, 4, 7, 16, 128):
            partition = ClassPartition(num_classes, world_size)
            chunks = torch.arange(num_classes).chunk(world_size)
            for rank in range(world_size):
                start, stop = partition.range(rank)
                expected = chunks[rank].tolist() if rank < len(chunks) else []
                assert list(range(start, stop)) == expected
                assert partition.size(rank) == len(expected)
                assert partition.owner(torch.arange(start, stop)).tolist() == [rank] * len(expected)


def sampled_negatives(start: int, stop: int, rate: float, seed: int, step: int) -> torch.Tensor:
    """The active rows of a shard that owns no sample of the batch."""
    nobody = OwnedSamples(torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    found = sampling.active_rows(nobody, start, stop, rate, seed, step, False, torch.float32)
    assert found.rows is not None
    return found.rows


def test_negatives_depend_on_seed_step_and_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sampled_negatives(0, 10_000, 0.2, seed=1, step=7)
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_CPU_PIECE", 333)
        parts = [sampled_negatives(a, b, 0.2, 1, 7) + a for a, b in ((0, 1), (1, 4000), (4000, 10_000))]
    assert torch.equal(torch.cat(parts), whole)
    other_step, other_seed = sampled_negatives(0, 10_000, 0.2, 1, 8), sampled_negatives(0, 10_000, 0.2, 2, 7)
    for other in (other_step, other_seed):
        common = len(set(whole.tolist()) & set(other.tolist()))
        assert 330 < common < 470, "independent draws at rate 0.2 share 400 of 10,000"


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_each_class_is_drawn_with_the_sample_rate(rate: float) -> None:
    counts = torch.zeros(2000)
    for step in range(200):
        counts[sampled_negatives(0, 2000, rate, seed=3, step=step)] += 1
    draws, sigma = 200 * 2000, (rate * (1 - rate)) ** 0.5
    assert abs(float(counts.sum()) / draws - rate) < 5 * sigma / draws**0.5
    assert float((counts / 200 - rate).abs().max()) < 6 * sigma / 200**0.5 + 1 / 200


def test_initial_weights_are_normal_and_a_function_of_the_class(ranks: Ranks) -> None:
    alone = PartialFC(5000, 33, losses.ArcFace(), seed=9).weight.detach()
    assert abs(float(alone.mean())) < 2e-4
    assert float(alone.std()) == pytest.approx(0.01, rel=0.02)
    kurtosis = float(((alone / alone.std()) ** 4).mean())
    assert kurtosis == pytest.approx(3.0, rel=0.05), "normal, not uniform"
    assert len(torch.unique(alone[:, 0])) > 4900, "rows differ"
    for world_size in (2, 3, 4):
        assert torch.equal(torch.cat(ranks.run(world_size, _initial_weight)), alone)
    assert not torch.equal(PartialFC(5000, 33, losses.ArcFace(), seed=10).weight, alone)


def _initial_weight(group: dist.ProcessGroup) -> torch.Tensor:
    return PartialFC(5000, 33, losses.ArcFace(), seed=9, process_group=group).weight.detach()
