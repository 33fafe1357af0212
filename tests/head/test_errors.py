"""Bad input gives the same clear error on every rank, at once; nobody hangs and nothing is updated."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from partialfc import (
    BatchMismatch,
    CenterLoss,
    ConfigError,
    LabelOutOfRange,
    NonFiniteEmbeddings,
    PartialFC,
    PartialFCError,
    RowSGD,
    losses,
)
from partialfc.head import gather
from tests.harness.ranks import Ranks

DIM, CLASSES, BATCH = 8, 20, 4
Corrupt = Callable[[Tensor, Any], tuple[Any, Any]]


def _with_nan(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone()
    x[2, 3] = float("nan")
    return x, y


def _with_inf(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone()
    x[1:3] = float("inf")
    return x, y


FAULTS: dict[str, tuple[Corrupt, type[PartialFCError], str]] = {
    "label too large": (lambda x, y: (x, y + CLASSES), LabelOutOfRange, r"rank 1: label 2\d \(sample 0 .*\[0, 20\)"),
    "label below -1": (lambda x, y: (x, y - 100), LabelOutOfRange, r"rank 1: label -\d+ \(sample 0"),
    "nan": (_with_nan, NonFiniteEmbeddings, r"rank 1: 1 of 4 embeddings hold NaN or Inf, the first at sample 2"),
    "inf": (_with_inf, NonFiniteEmbeddings, r"rank 1: 2 of 4 embeddings hold NaN or Inf, the first at sample 1"),
    "batch too large": (
        lambda x, y: (torch.cat((x, x)), torch.cat((y, y))),
        BatchMismatch,
        r"rank 1: a batch of 8 samples exceeds the 4 agreed",
    ),
    "wrong dim": (lambda x, y: (x[:, :5], y), BatchMismatch, r"rank 1: embeddings must be \[batch, 8\], got \[4, 5\]"),
    "not 2d": (
        lambda x, y: (x[0], y),
        BatchMismatch,
        r"rank 1: embeddings must be \[batch, 8\], got a tensor of 1",
    ),
    "fewer labels": (lambda x, y: (x, y[:3]), BatchMismatch, r"rank 1: labels must be \[4\].* got 3 labels"),
    "float labels": (lambda x, y: (x, y.float()), BatchMismatch, r"rank 1: labels must be int64, got torch.float32"),
    "labels as a list": (lambda x, y: (x, y.tolist()), BatchMismatch, r"rank 1: labels must be \[4\]"),
    "other dtype": (
        lambda x, y: (x.double(), y),
        BatchMismatch,
        r"rank 1: embeddings are torch.float64, but",
    ),
    "integer embeddings": (
        lambda x, y: (x.long(), y),
        BatchMismatch,
        r"rank 1: embeddings must be .* got torch.int64",
    ),
    "no tensor": (lambda x, y: (None, y), BatchMismatch, r"rank 1: embeddings must be \[batch, 8\]"),
}


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, DIM, generator=generator), torch.tensor([0, 7, 13, 19])


def _fail_on_rank_one(group: dist.ProcessGroup, fault: str, first_call: bool) -> dict[str, Any]:
    rank = dist.get_rank(group)
    head = PartialFC(CLASSES, DIM, losses.ArcFace(), center_loss=CenterLoss(), process_group=group)
    optimizer = RowSGD(head.parameters())
    x, y = _batch()
    if not first_call:
        head(x.requires_grad_(), y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = [head.weight.detach().clone(), head.center_loss.centers.clone(), head.step.clone()]
    bad = FAULTS[fault][0](x.detach(), y) if rank == 1 else (x, y)
    started = time.monotonic()
    try:
        head(*bad)
    except PartialFCError as error:
        caught: Any = error
    else:
        caught = None
    seconds = time.monotonic() - started
    after = [head.weight.detach(), head.center_loss.centers, head.step]
    if first_call:
        head.reset_batch_format()
    works_again = float(head(x, y).loss)
    unchanged = all(map(torch.equal, before, after))
    return {"error": caught, "seconds": seconds, "unchanged": unchanged, "works": works_again > 0}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_on_one_rank_raises_the_same_error_on_all(ranks: Ranks, fault: str) -> None:
    _, expected, words = FAULTS[fault]
    for world_size in (2, 3):
        results = ranks.run(world_size, _fail_on_rank_one, fault, False)
        for result in results:
            assert type(result["error"]) is expected
            assert str(result["error"]) == str(results[0]["error"])
            assert result["error"].args[0] is not None
            assert result["seconds"] < 5
            assert result["unchanged"]
            assert result["works"], "the next good batch must work"
        with pytest.raises(expected, match=words):
            raise results[0]["error"]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "batch too large"])
def test_bad_input_in_the_first_call_raises_on_all_ranks_too(ranks: Ranks, fault: str) -> None:
    results = ranks.run(3, _fail_on_rank_one, fault, True)
    assert {type(result["error"]) for result in results} == {FAULTS[fault][1]}
    assert len({str(result["error"]) for result in results}) == 1


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("batch too large", "other dtype")])
def test_a_single_process_raises_the_same_errors(fault: str) -> None:
    corrupt, expected, words = FAULTS[fault]
    head = PartialFC(CLASSES, DIM, losses.ArcFace())
    with pytest.raises(expected, match=words.replace("rank 1", "rank 0")):
        head(*corrupt(*_batch()))


def _disagree(group: dist.ProcessGroup, about: str) -> str:
    rank = dist.get_rank(group)
    seed = rank if about == "seed" else 0
    margin = 0.5 - 0.1 * rank if about == "margin" else 0.5
    dtype = torch.float64 if about == "dtype" and rank == 1 else torch.float32
    head = PartialFC(
        CLASSES,
        DIM,
        losses.ArcFace(margin=margin),
        sample_rate=lambda step: 0.5 / (1 + rank) if about == "rate" else 0.5,
        seed=seed,
        weight_dtype=dtype,
        process_group=group,
    )
    head.train(not (about == "mode" and rank == 1))
    x, y = _batch()
    try:
        head(x, y, step=rank if about == "step" else None)
    except BatchMismatch as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ("seed", "heads of rank 0 and rank 1 differ"),
        ("margin", "heads of rank 0 and rank 1 differ"),
        ("step", "disagree about the step: rank 0 has 0, rank 1 has 1"),
        ("mode", "rank 0 has training with gradients, rank 1 has evaluation with gradients"),
        ("rate", "disagree about the sample rate: rank 0 has 0.5, rank 1 has 0.25"),
        ("dtype", "heads of rank 0 and rank 1 differ"),
    ],
)
def test_disagreeing_ranks_are_reported(ranks: Ranks, about: str, words: str) -> None:
    messages = ranks.run(2, _disagree, about)
    assert messages[0] == messages[1]
    assert words in messages[0]


def _late_error(group: dist.ProcessGroup, through_optimizer: bool) -> dict[str, Any]:
    with patch.object(gather, "errors_are_deferred", return_value=True):  # as on a GPU
        return _find_error_late(group, through_optimizer)


def _find_error_late(group: dist.ProcessGroup, through_optimizer: bool) -> dict[str, Any]:
    head = PartialFC(CLASSES, DIM, losses.ArcFace(), center_loss=CenterLoss(), process_group=group)
    optimizer = RowSGD(head.parameters())
    x, y = _batch()
    head(x.requires_grad_(), y).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [head.weight.detach().clone(), head.center_loss.centers.clone(), head.step.clone()]
    if dist.get_rank(group) == 1:
        y = y + CLASSES
    out = head(x, y)  # does not raise here
    out.loss.backward()
    error = None
    try:
        optimizer.step() if through_optimizer else head(*_batch())
    except PartialFCError as raised:
        error = raised
    after = [head.weight.detach(), head.center_loss.centers, head.step]
    unchanged = all(map(torch.equal, before, after))
    optimizer.zero_grad()
    head(*_batch())
    return {"error": error, "loss": float(out.loss), "unchanged": unchanged}


@pytest.mark.parametrize("through_optimizer", [True, False])
def test_an_error_found_late_is_raised_before_anything_is_updated(ranks: Ranks, through_optimizer: bool) -> None:
    results = ranks.run(2, _late_error, through_optimizer)
    for result in results:
        assert isinstance(result["error"], LabelOutOfRange)
        assert "rank 1: label 20" in str(result["error"])
        assert result["loss"] == 0.0, "the step is harmless"
        assert result["unchanged"]


def _propagate(group: dist.ProcessGroup) -> dict[str, Any]:
    head = PartialFC(CLASSES, DIM, losses.ArcFace(), on_nonfinite="propagate", process_group=group)
    x, y = _batch()
    if dist.get_rank(group) == 1:
        x[0, 0] = float("inf")
    x.requires_grad_()
    out = head(x, y)
    out.loss.backward()
    return {
        "loss": float(out.loss),
        "x": bool(torch.isnan(x.grad).all()),
        "w": bool(torch.isnan(head.weight.grad.to_dense()).any()),
    }


def test_propagated_nan_reaches_every_rank(ranks: Ranks) -> None:
    for result in ranks.run(3, _propagate):
        assert result["loss"] != result["loss"]
        assert result["x"]
        assert result["w"]


@pytest.mark.parametrize("on_nonfinite", ["raise", "propagate"])
def test_an_ignored_sample_has_no_influence_not_even_as_nan(on_nonfinite: str) -> None:
    x, y = _batch()
    grads = []
    for value in (0.0, float("nan"), float("inf")):
        head = PartialFC(CLASSES, DIM, losses.ArcFace(), center_loss=CenterLoss(), on_nonfinite=on_nonfinite)
        embeddings, labels = x.clone(), y.clone()
        embeddings[2], labels[2] = value, -1
        embeddings.requires_grad_()
        head(embeddings, labels).loss.backward()
        grads.append((head.weight.grad.to_dense(), embeddings.grad))
    for weight, embeddings in grads[1:]:
        assert torch.equal(weight, grads[0][0])
        assert torch.equal(embeddings, grads[0][1])
    assert bool((grads[0][1][2] == 0).all())


def _made_too_early(group: dist.ProcessGroup) -> list[str]:
    head = PartialFC(CLASSES, DIM, losses.ArcFace(), process_group=group)
    head.collectives._group = None  # as it is for a head that was made before init_process_group
    messages = []
    for call in (lambda: head(*_batch()), lambda: head.rows(torch.tensor([0]))):
        with pytest.raises(ConfigError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_a_head_made_before_the_process_group_is_refused(ranks: Ranks) -> None:
    for messages in ranks.run(2, _made_too_early):
        assert all("made before torch.distributed.init_process_group" in message for message in messages)


def _rows(group: dist.ProcessGroup, ids: list[list[int]]) -> Any:
    head = PartialFC(CLASSES, DIM, losses.ArcFace(), seed=2, process_group=group)
    try:
        return head.rows(torch.tensor(ids[dist.get_rank(group)]))
    except PartialFCError as error:
        return error


def test_rows_gives_any_class_centres_on_every_rank(ranks: Ranks) -> None:
    weight = PartialFC(CLASSES, DIM, losses.ArcFace(), seed=2).weight.detach()
    for world_size in (1, 2, 3, 4):
        for found in ranks.run(world_size, _rows, [[19, 0, 7, 7]] * 4):
            assert torch.equal(found, weight[[19, 0, 7, 7]])
    errors = ranks.run(2, _rows, [[0, 1], [0, 20]])
    assert [type(error) for error in errors] == [LabelOutOfRange] * 2
    errors = ranks.run(2, _rows, [[0, 1], [0, 1, 2]])
    assert [type(error) for error in errors] == [BatchMismatch] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_classes": 0}, "at least 1"),
        ({"embedding_dim": 0}, "at least 1"),
        ({"loss": torch.nn.CrossEntropyLoss()}, "partialfc.losses.Loss"),
        ({"sample_rate": 0.0}, r"sample_rate must be a number in \(0, 1\] .*, got 0.0"),
        ({"sample_rate": 1.5}, r"sample_rate must be a number in \(0, 1\] .*, got 1.5"),
        ({"filter_threshold": 1.5}, r"\[-1, 1\], got 1.5"),
        ({"on_nonfinite": "ignore"}, "raise"),
        ({"weight_dtype": torch.float16}, "weight_dtype must be .*, got torch.float16"),
        ({"compute_dtype": torch.bfloat16}, "float32 or torch.float64, got torch.bfloat16"),
        ({"memory_budget_mb": 0}, "memory_budget_mb must be a positive number, got 0"),
        ({"memory_budget_mb": "256"}, "memory_budget_mb must be a positive number, got '256'"),
        ({"num_classes": 10.0}, "num_classes must be an int, got 10.0"),
        ({"embedding_dim": "8"}, "embedding_dim must be an int, got '8'"),
        ({"seed": None}, "seed must be an int, got None"),
        ({"sample_rate": "0.1"}, "sample_rate must be a number .*, got '0.1'"),
        ({"sample_rate": True}, "sample_rate must be a number .*, got True"),
        ({"filter_threshold": "0.4"}, r"\[-1, 1\], got '0.4'"),
        ({"center_loss": 0.003}, "center_loss must be a CenterLoss, .*, got 0.003"),
        ({"weight_dtype": "float32"}, "weight_dtype must be .*, got float32"),
    ],
)
def test_arguments_of_a_wrong_type_or_out_of_range_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PartialFC(**({"num_classes": CLASSES, "embedding_dim": DIM, "loss": losses.ArcFace()} | arguments))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: losses.ArcFace(scale=-1), "scale must be a positive number, got -1"),
        (lambda: losses.ArcFace(scale=float("nan")), "scale must be a positive number"),
        (lambda: losses.ArcFace(margin=2.0), r"margin must lie in \[0, 1.5708\], got 2.0"),
        (lambda: losses.CosFace(margin=-0.1), r"margin must lie in \[0, 2\], got -0.1"),
        (lambda: losses.CombinedMargin(m1=0.0), r"m1 must lie in \[1, 8\], got 0.0"),
        (lambda: losses.ArcFace(margin_gradient="none"), "margin_gradient must be one of"),
        (lambda: CenterLoss(weight=-1), "weight must be at least 0, got -1"),
        (lambda: CenterLoss(alpha=2), r"alpha must lie in \[0, 1\], got 2"),
        (lambda: RowSGD([torch.zeros(1)], momentum=1.0), r"momentum must lie in \[0, 1\), got 1.0"),
        (lambda: RowSGD([torch.zeros(1)], lr=-1), "lr must be at least 0, got -1"),
    ],
)
def test_wrong_parameters_are_refused_with_the_valid_range(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_center_loss_belongs_to_one_head() -> None:
    shared = CenterLoss()
    PartialFC(CLASSES, DIM, losses.ArcFace(), center_loss=shared)
    with pytest.raises(ConfigError, match="already belongs to a head"):
        PartialFC(CLASSES, DIM, losses.ArcFace(), center_loss=shared)


def test_a_sample_rate_schedule_out_of_range_is_refused_when_it_is_used() -> None:
    head = PartialFC(CLASSES, DIM, losses.ArcFace(), sample_rate=lambda step: 1.0 - step)
    x, y = _batch()
    head(x, y, step=0)
    with pytest.raises(ConfigError, match=r"sample_rate must lie in \(0, 1\], got 0.0 at step 1"):
        head(x, y, step=1)
