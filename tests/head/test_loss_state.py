"""State of losses across steps: equal on all ranks, advanced by applied steps only, saved and loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from partialfc import CenterLoss, PartialFC, RowSGD, losses
from partialfc.head.random import normal_rows, stream_key
from tests.harness.dense_reference import CenterTerm, Extras, Spec, base_of, dense_head, relative_error, sub_centers_of
from tests.harness.grids import pairwise
from tests.harness.loss_cases import LOSSES, make_loss
from tests.harness.ranks import Ranks

CLASSES, DIM, BATCH, STEPS, LR = 29, 12, 10, 5, 0.5


def initial_state(name: str) -> Tensor | None:
    known = {"curricularface": [0.0], "adaface": [20.0, 100.0]}
    return torch.tensor(known[name], dtype=torch.float64) if name in known else None


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for step in range(STEPS):
        x = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64) * (3 + step)
        y = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        y[step % BATCH] = -1
        found.append((x, y))
    return found


def several_steps(group: dist.ProcessGroup, spec: Spec, weight: Tensor) -> dict[str, Any]:
    """Train a few steps on this rank; returns each step's loss, and everything that is left at the end."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    center = CenterLoss(weight=0.1, alpha=0.5)
    head = PartialFC(CLASSES, DIM, make_loss(spec), center_loss=center, weight_dtype=torch.float64, process_group=group)
    with torch.no_grad():
        head.weight.copy_(weight[slice(*head.partition.range(rank))])
    optimizer = RowSGD(head.parameters(), lr=LR, momentum=0.0, weight_decay=0.0)
    curve, states = [], []
    for x, y in batches():
        mine = [part[rank] for part in (x.tensor_split(world_size), y.tensor_split(world_size))]
        out = head(mine[0].requires_grad_(), mine[1])
        before = None if head.loss.stateful.state is None else head.loss.stateful.state.clone()
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(out.loss))
        states.append((before, None if before is None else head.loss.stateful.state.clone()))
    learned = [parameter.detach().clone() for parameter in head.loss.parameters()]
    return {
        "curve": curve,
        "states": states,
        "weight": head.weight.detach(),
        "centers": center.centers,
        "learned": learned,
        "state_dict": {name: value.clone() for name, value in head.state_dict().items() if name.startswith("loss.")},
    }


def dense_steps(spec: Spec, weight: Tensor) -> dict[str, Any]:
    """The same by the dense reference and plain gradient descent."""
    name = base_of(spec)["name"]
    state, bias, weight = initial_state(name), None, weight.clone()
    centers = torch.zeros(CLASSES, DIM, dtype=torch.float64)
    if name == "uce":
        bias = torch.tensor([10.0 * CLASSES]).log().double()
    curve, states = [], []
    for step, (x, y) in enumerate(batches()):
        noise = torch.empty(BATCH, 1)
        normal_rows(stream_key(0, 3, step), torch.arange(BATCH), 1, 1.0, noise)
        extras = Extras(state, noise[:, 0].double(), None if bias is None else bias.clone().requires_grad_(), step)
        found = dense_head(spec, x, y, weight, center=CenterTerm(centers, 0.1, 0.5), extras=extras)
        states.append((state, found.state))
        weight, centers, state = weight - LR * found.grad_weight, found.centers, found.state
        if bias is not None:
            bias = bias - LR * found.grad_loss_bias
        curve.append(float(found.loss))
    return {"curve": curve, "states": states, "weight": weight, "centers": centers, "bias": bias}


@pytest.mark.parametrize(
    ("name", "world_size"),
    pairwise([name for name, spec in LOSSES.items() if base_of(spec)["name"] != "softmax"], [1, 2, 3, 4]),
)
def test_several_steps_are_those_of_a_dense_computation(ranks: Ranks, name: str, world_size: int) -> None:
    spec = LOSSES[name]
    k = sub_centers_of(spec)
    shape = (CLASSES, DIM) if k is None else (CLASSES, k, DIM)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results, expected = ranks.run(world_size, several_steps, spec, weight), dense_steps(spec, weight)
    for result in results:
        # b is kept in float32: its rounding is what is left of a difference.
        tolerance = 1e-6 if result["learned"] else 1e-9
        assert result["curve"] == pytest.approx(expected["curve"], rel=tolerance)
        for (before, after), (dense_before, dense_after) in zip(result["states"], expected["states"], strict=True):
            if dense_after is not None:
                torch.testing.assert_close(before, dense_before, msg="the forward pass must not change the state")
                torch.testing.assert_close(after, dense_after)
                assert not torch.equal(after, before), "an applied step advances it"
        for learned in result["learned"]:
            assert relative_error(learned, expected["bias"]) <= 1e-6
        for key, value in result["state_dict"].items():
            assert torch.equal(value, results[0]["state_dict"][key]), "ranks disagree"
    for key in ("weight", "centers"):
        whole = torch.cat([result[key] for result in results])
        assert relative_error(whole, expected[key]) <= (1e-6 if results[0]["learned"] else 1e-8)


STATEFUL = ["curricularface", "adaface", "focal sub-center curricularface", "uce"]


def made(name: str, **options: Any) -> tuple[PartialFC, RowSGD]:
    head = PartialFC(CLASSES, DIM, make_loss(LOSSES[name]), **options)
    return head, RowSGD(head.parameters(), lr=0.1)


def carried(head: PartialFC) -> list[Tensor]:
    """Copies of everything that the head's loss carries."""
    return [value.clone() for name, value in sorted(head.state_dict().items()) if name.startswith("loss.")]


def small_batch(seed: int = 0, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, DIM, generator=generator) * 4
    return x.requires_grad_(), torch.randint(0, CLASSES, (n,), generator=generator)


@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_advances_with_an_applied_step_only(name: str) -> None:
    head, optimizer = made(name)
    start = carried(head)
    assert start, "there is a state"

    def unchanged() -> bool:
        return all(torch.equal(a, b) for a, b in zip(carried(head), start, strict=True))

    head.eval()
    head(*small_batch())
    head.train()
    with torch.no_grad():
        head(*small_batch())
    assert unchanged(), "neither evaluation nor a forward pass without gradients"
    head(*small_batch())
    assert unchanged(), "nor a forward pass whose backward never comes"
    head(*small_batch()).loss.backward()
    optimizer.zero_grad()
    head(*small_batch(1))
    assert unchanged(), "nor a skipped step"
    assert int(head.step) == 1
    head(*small_batch()).loss.backward()
    optimizer.step()
    assert not unchanged(), "an applied one does"
    advanced = carried(head)
    optimizer.zero_grad()
    head.eval()
    before = float(head(*small_batch(2)).loss)
    assert float(head(*small_batch(2)).loss) == before
    assert all(torch.equal(a, b) for a, b in zip(carried(head), advanced, strict=True))


@pytest.mark.parametrize("name", ["curricularface", "adaface"])
def test_micro_batches_advance_the_state_once_by_all_their_samples(name: str) -> None:
    x, y = small_batch(n=9)
    whole, whole_optimizer = made(name, weight_dtype=torch.float64)
    whole(x.detach().double().requires_grad_(), y).loss.backward()
    whole_optimizer.step()
    parts, parts_optimizer = made(name, weight_dtype=torch.float64)
    for part in (slice(0, 2), slice(2, 3), slice(3, 9)):
        out = parts(x.detach()[part].double().requires_grad_(), y[part])
        out.loss.backward(retain_graph=True)
        out.loss.backward()  # the same samples again: they count once
    parts_optimizer.step()
    torch.testing.assert_close(parts.loss.state, whole.loss.state, rtol=1e-12, atol=0)


def test_the_positions_of_micro_batches_continue() -> None:
    x, y = small_batch(n=9)
    loss = losses.ElasticArcFace(std=0.3)
    whole, _ = PartialFC(CLASSES, DIM, loss), None
    expected = x.detach().clone().requires_grad_()
    whole(expected, y).loss.backward()
    parts = PartialFC(CLASSES, DIM, loss)
    for part in (slice(0, 4), slice(4, 9)):
        mine = x.detach()[part].clone().requires_grad_()
        (parts(mine, y[part]).loss * (len(y[part]) / 9)).backward()
        torch.testing.assert_close(mine.grad, expected.grad[part], msg="each sample keeps the draw of its position")


@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_is_saved_and_loaded(name: str) -> None:
    head, optimizer = made(name)
    for seed in range(3):
        head(*small_batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    other, _ = made(name)
    assert float(other(*small_batch(9)).loss) != pytest.approx(float(head(*small_batch(9)).loss), rel=1e-6)
    other.load_state_dict(head.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(carried(head), carried(other), strict=True))
    assert torch.equal(other(*small_batch(9)).loss, head(*small_batch(9)).loss)
    other.reset_parameters()
    fresh, _ = made(name)
    assert all(torch.equal(a, b) for a, b in zip(carried(other), carried(fresh), strict=True))


def test_a_batch_of_ignored_samples_leaves_the_state_unchanged() -> None:
    for name in ("curricularface", "adaface"):
        head, optimizer = made(name)
        start = carried(head)
        out = head(small_batch()[0], torch.full((8,), -1))
        out.loss.backward()
        optimizer.step()
        assert float(out.loss) == 0.0
        assert all(torch.equal(a, b) for a, b in zip(carried(head), start, strict=True))


def test_one_sample_has_a_mean_but_no_deviation() -> None:
    head, optimizer = made("adaface")
    x = torch.full((1, DIM), 2.0, requires_grad=True)
    head(x, torch.tensor([3])).loss.backward()
    optimizer.step()
    assert head.loss.mean == pytest.approx(0.99 * 20 + 0.01 * 2 * DIM**0.5)
    assert head.loss.std == 100.0


def test_not_a_number_never_enters_the_state() -> None:
    for name in ("curricularface", "adaface", "uce"):
        head, optimizer = made(name, on_nonfinite="propagate")
        start = carried(head)
        x, y = small_batch()
        with torch.no_grad():
            x[2, 3] = torch.nan
        out = head(x, y)
        out.loss.backward()
        assert bool(torch.isnan(out.loss))
        assert all(bool(torch.isnan(p.grad).all()) for p in head.loss.parameters()), "a loss scaler sees it here too"
        optimizer.zero_grad()  # skipped
        head(*small_batch(1)).loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(carried(head), start, strict=True))


def test_the_threshold_of_uce_starts_from_the_classes_that_take_part() -> None:
    start = torch.tensor([10 * CLASSES * 0.25]).log()
    assert torch.equal(PartialFC(CLASSES, DIM, losses.UCE(), sample_rate=0.25).loss.bias, start)
    assert float(PartialFC(CLASSES, DIM, losses.UCE(bias=3.5)).loss.bias) == 3.5
