"""Lasting memory: bytes of a class against the tensors themselves, and bytes of a backbone by engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partialfc import CenterLoss, LinearRate, PartialFC, RowAdagrad, RowAdamW, RowSGD, StepRate, losses
from partialfc.errors import ConfigError
from partialfc.head.optim.deferred_decay import deferred_decay_of
from partialfc.head.sample_rate import largest_rate
from partialfc.planning.memory import backbone_memory, head_memory

CLASSES, DIM = 60, 24


@pytest.mark.parametrize("loss", ["arcface", "softmax", "sub-centers"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("sgd", {}),
        ("sgd", {"unsampled_rows": "decayed"}),
        ("sgd", {"momentum": False}),
        ("sgd", {"state_dtype": "bfloat16"}),
        ("adamw", {}),
        ("adamw", {"state_dtype": "bfloat16"}),
        ("adagrad", {}),
    ],
)
def test_planned_bytes_are_those_of_the_tensors(
    optimizer: str, options: dict[str, Any], weight_dtype: str, center: bool, loss: str
) -> None:
    made = {"arcface": losses.ArcFace(), "softmax": losses.Softmax(), "sub-centers": losses.SubCenterArcFace()}[loss]
    head = PartialFC(
        CLASSES,
        DIM,
        made,
        sample_rate=0.5,
        weight_dtype=getattr(torch, weight_dtype),
        center_loss=CenterLoss() if center else None,
    )
    state_dtype = getattr(torch, options["state_dtype"]) if "state_dtype" in options else None
    rows: Any
    if optimizer == "sgd":
        unsampled = options.get("unsampled_rows", "frozen")
        momentum = 0.9 if options.get("momentum", True) else 0.0
        rows = RowSGD(head.parameters(), momentum=momentum, unsampled_rows=unsampled, state_dtype=state_dtype)
    elif optimizer == "adamw":
        rows = RowAdamW(head.parameters(), state_dtype=state_dtype)
    else:
        rows = RowAdagrad(head.parameters())
    out = head(torch.randn(8, DIM, requires_grad=True), torch.randint(0, CLASSES, (8,)))
    out.loss.backward()
    gradient = head.weight.grad
    rows.step()
    tensors = [*head.parameters(), *(value for state in rows.state.values() for value in state.values())]
    if center:
        tensors.append(head.center_loss.centers)
    deferred = [deferred_decay_of(parameter) for parameter in head.parameters()]
    tensors += [record._last for record in deferred if record is not None]
    expected = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.dim())
    plan = head_memory(
        DIM,
        optimizer,
        weight_dtype=weight_dtype,
        center_loss=center,
        sub_centers=3 if loss == "sub-centers" else 1,
        class_bias=loss == "softmax",
        **options,
    )
    assert plan.per_class * CLASSES == expected
    assert plan.active * out.active_rows >= gradient._values().numel() * 4 + gradient._indices().numel() * 8


def test_the_largest_number_of_classes_just_fits() -> None:
    plan = head_memory(512, "adagrad", weight_dtype="bfloat16")
    most = plan.largest_num_classes(24 * 2**30, 0.1)
    assert plan.total(most, 0.1) <= 24 * 2**30 < plan.total(most + 1, 0.1)
    assert plan.largest_num_classes(10, 0.1) == 0


def test_rates_report_their_largest() -> None:
    assert largest_rate(0.3) == 0.3
    assert largest_rate(LinearRate(0.1, 0.8, 10)) == 0.8
    assert largest_rate(StepRate([0.1, 0.5], [0, 5])) == 0.5
    assert largest_rate(lambda step: 0.2) == 1.0, "a function that does not say may reach 1"
    for wrong in (
        lambda: StepRate([0.1, 0.2], [0]),
        lambda: StepRate([0.1, 0.2], [1, 2]),
        lambda: StepRate([0.1, 1.2], [0, 2]),
        lambda: StepRate([], []),
        lambda: LinearRate(0.0, 1.0, 10),
        lambda: LinearRate(0.1, 1.0, 0),
    ):
        with pytest.raises(ConfigError):
            wrong()


def test_a_schedule_ends_with_all_classes() -> None:
    head = PartialFC(2000, 8, losses.ArcFace(16.0), sample_rate=StepRate([0.1, 0.4, 1.0], [0, 2, 4]))
    optimizer = RowSGD(head.parameters())
    active = []
    for _ in range(5):
        out = head(torch.randn(4, 8, requires_grad=True), torch.randint(0, 2000, (4,)))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        active.append(out.active_rows)
    assert active == pytest.approx([200, 200, 800, 800, 2000], rel=0.2)
    assert active[-1] == 2000


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_lasting_memory_of_a_backbone_follows_the_engine(precision: Any, width: int) -> None:
    plain = backbone_memory(1000, "adamw", precision=precision)
    assert plain == {"weights": 4000, "gradients": 4000, "optimizer": 8000}
    stages = [backbone_memory(1000, "adamw", precision=precision, zero_stage=stage, world_size=4) for stage in range(4)]
    master = 0 if width == 4 else 4000
    assert stages[0] == {"weights": 1000 * width, "gradients": 1000 * width, "optimizer": master + 8000}
    assert stages[1] == {"weights": 1000 * width, "gradients": 1000 * width, "optimizer": 3000}
    assert stages[2] == {"weights": 1000 * width, "gradients": 250 * width, "optimizer": 3000}
    assert stages[3] == {"weights": 250 * width, "gradients": 250 * width, "optimizer": 3000}
