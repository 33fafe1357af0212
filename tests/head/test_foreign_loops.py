"""The head in other people's loops: calls that share a backward, looks at gradients, checkpointing, freezing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from partialfc import CenterLoss, ConfigError, PartialFC, RowSGD, StepRate, losses
from partialfc.errors import DoubleBackward
from tests.harness.dense_reference import relative_error
from tests.harness.loss_cases import LOSSES, make_loss
from tests.harness.ranks import Ranks
from tests.harness.rows import CLASSES, DIM, small_batch, small_head

ALPHA, MOMENTUM = 0.5, 0.1
Batch = tuple[Tensor, Tensor]


def stateful_head(**arguments: Any) -> PartialFC:
    """A float64 head with everything that follows the step: centers, and t of CurricularFace."""
    loss = losses.CurricularFace(scale=16.0, momentum=MOMENTUM)
    center = CenterLoss(weight=0.1, alpha=ALPHA)
    return PartialFC(CLASSES, DIM, loss, center_loss=center, weight_dtype=torch.float64, **arguments)


def two_batches() -> tuple[Batch, Batch]:
    (x, y), (v, z) = small_batch(1, 6), small_batch(2, 4)
    return (x.detach().double().requires_grad_(), y), (v.detach().double().requires_grad_(), z)


def followed(head: PartialFC) -> tuple[int, float, Tensor]:
    """What moves with the step: counter, t, centers."""
    return int(head.step), head.loss.t, head.center_loss.centers.clone()


def same(mine: tuple[int, float, Tensor], other: tuple[int, float, Tensor]) -> bool:
    return mine[:2] == pytest.approx(other[:2], rel=1e-12) and bool(torch.allclose(mine[2], other[2], rtol=1e-12))


def expected_after(weight: Tensor, *batches: Batch) -> tuple[int, float, Tensor]:
    """Counter, t and centers after one step over all samples, from their definitions."""
    x, y = (torch.cat([batch[i].detach() for batch in batches]) for i in (0, 1))
    t = MOMENTUM * torch.cosine_similarity(x, weight[y]).mean()
    centers = torch.zeros(CLASSES, DIM, dtype=torch.float64)
    for label in y.unique().tolist():
        mine = x[y == label]
        centers[label] = ALPHA * mine.sum(0) / (1 + len(mine))
    return 1, float(t), centers


def one_sum(head: PartialFC, first: Batch, second: Batch) -> None:
    (head(*first).loss + head(*second).loss).backward()


def one_list(head: PartialFC, first: Batch, second: Batch) -> None:
    torch.autograd.backward([head(*first).loss, head(*second).loss])


def two_backwards(head: PartialFC, first: Batch, second: Batch) -> None:
    calls = [head(*first).loss, head(*second).loss]
    for loss in calls:
        loss.backward()


def retained(head: PartialFC, first: Batch, second: Batch) -> None:
    loss = (head(*first).loss + head(*second).loss) / 2
    loss.backward(retain_graph=True)
    loss.backward()


def assigned(head: PartialFC, first: Batch, second: Batch) -> None:
    loss = head(*first).loss + head(*second).loss
    (head.weight.grad,) = torch.autograd.grad(loss, [head.weight])


@pytest.mark.parametrize("backward", [one_sum, one_list, two_backwards, retained, assigned])
def test_calls_that_share_a_step_count_once_with_all_their_samples(backward: Callable[..., None]) -> None:
    head = stateful_head()
    start = head.weight.detach().clone()
    first, second = two_batches()
    expected_gradient = torch.zeros_like(start)
    for batch in (first, second):
        other = stateful_head()
        other(*batch).loss.backward()
        expected_gradient += other.weight.grad.to_dense()
    optimizer = RowSGD(head.parameters(), lr=0.01)
    backward(head, first, second)
    assert relative_error(head.weight.grad.to_dense(), expected_gradient) <= 1e-9
    assert int(head.step) == 0
    optimizer.step()
    optimizer.zero_grad()
    head.state_dict()  # closes a step that was skipped
    assert same(followed(head), expected_after(start, first, second))


def test_the_schedule_of_the_sample_rate_follows_steps_not_calls() -> None:
    head = small_head(sample_rate=StepRate([0.1, 1.0], [0, 3]))
    optimizer = RowSGD(head.parameters(), lr=0.01)
    active = []
    for seed in range(4):
        calls = [head(*small_batch(seed)), head(*small_batch(seed + 10))]
        active.append({call.active_rows == CLASSES for call in calls})
        sum(call.loss for call in calls).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert active == [{False}] * 3 + [{True}]


def _views_on_ranks(group: dist.ProcessGroup) -> tuple[int, float, Tensor, Tensor]:
    """Train a step on two views by ranks, with and without checkpointing; returns what follows the step."""
    head = stateful_head(process_group=group, sample_rate=0.5)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = [[part.tensor_split(size)[rank] for part in batch] for batch in two_batches()]
    first, second = [(x.detach().requires_grad_(), y) for x, y in mine]
    kept = checkpoint(lambda x: head(x, first[1]).loss * 1.0, first[0], use_reentrant=False)
    (kept + head(*second).loss).backward()
    RowSGD(head.parameters(), lr=0.1).step()
    step, t, centers = followed(head)
    return step, t, centers, head.weight.detach()


def test_two_views_are_one_step_at_any_world_size(ranks: Ranks) -> None:
    ((step, t, centers, weight),) = ranks.run(1, _views_on_ranks)
    for world_size in (2, 3):
        results = ranks.run(world_size, _views_on_ranks)
        assert [result[0] for result in results] == [step] * world_size == [1] * world_size
        assert [result[1] for result in results] == pytest.approx([t] * world_size, rel=1e-9)
        assert relative_error(torch.cat([result[2] for result in results]), centers) <= 1e-9
        assert relative_error(torch.cat([result[3] for result in results]), weight) <= 1e-9


@pytest.mark.parametrize("place", ["before backward", "after step"])
def test_two_views_of_a_skipped_step_are_dropped(place: str) -> None:
    head = stateful_head()
    start = head.weight.detach().clone()
    first, second = two_batches()
    optimizer = RowSGD(head.parameters(), lr=0.0)
    one_sum(head, first, second)  # no step
    if place == "after step":
        optimizer.zero_grad()
    loss = head(*second).loss + head(*second).loss
    optimizer.zero_grad()
    loss.backward()
    assert followed(head)[:2] == (1, 0.0)
    optimizer.step()
    expected = expected_after(start, second, second)
    assert same(followed(head), (2, *expected[1:]))


def look(head: PartialFC, x: Tensor, y: Tensor) -> None:
    torch.autograd.grad(head(x, y).loss, x)


def look_at_weight(head: PartialFC, x: Tensor, y: Tensor) -> None:
    torch.autograd.grad(head(x, y).loss, [head.weight])


def only_embeddings(head: PartialFC, x: Tensor, y: Tensor) -> None:
    head(x, y).loss.backward(inputs=[x])


@pytest.mark.parametrize("peek", [look, look_at_weight, only_embeddings])
@pytest.mark.parametrize("name", ["curricularface", "adaface", "elasticface-arc", "uce"])
def test_looking_at_a_gradient_changes_nothing(name: str, peek: Callable[..., None]) -> None:
    heads = [PartialFC(CLASSES, DIM, make_loss(LOSSES[name]), 0.3, center_loss=CenterLoss()) for _ in range(2)]
    for number, head in enumerate(heads):
        optimizer = RowSGD(head.parameters(), lr=0.1)
        for seed in range(3):
            x, y = small_batch(seed)
            if number:
                peek(head, *small_batch(seed + 5))
                peek(head, x, y)
            head(x, y).loss.backward()
            if number:
                peek(head, *small_batch(seed + 5))
            optimizer.step()
            optimizer.zero_grad()
    looked_at, plain = (head.state_dict() for head in reversed(heads))
    for key, value in plain.items():
        assert torch.equal(looked_at[key], value), key


def test_a_head_that_is_only_looked_at_never_steps() -> None:
    head = stateful_head()
    for _ in range(3):
        look(head, *two_batches()[0])
    RowSGD(head.parameters()).step()
    assert head.state_dict()["step"] == 0
    assert head.loss.t == 0.0


def test_a_second_derivative_is_refused() -> None:
    head = small_head(center_loss=CenterLoss())
    x, y = small_batch()
    (gradient,) = torch.autograd.grad(head(x, y).loss, x, create_graph=True)
    with pytest.raises(DoubleBackward, match="create_graph=True"):
        (head(x, y).loss + gradient.square().sum()).backward()
    head(x, y).loss.backward(create_graph=True)
    with pytest.raises(DoubleBackward, match="first derivatives only"):
        head.weight.grad.coalesce().values().sum().backward()


def test_a_graph_of_gradients_changes_no_gradient() -> None:
    head, plain = stateful_head(sample_rate=0.5), stateful_head(sample_rate=0.5)
    (x, y), _ = two_batches()
    v = x.detach().clone().requires_grad_()
    head(x, y).loss.backward(create_graph=True)
    plain(v, y).loss.backward()
    assert torch.equal(x.grad, v.grad)
    for each in (head, plain):
        RowSGD(each.parameters()).step()
        each.weight.grad = None
    assert torch.equal(head.weight, plain.weight)
    assert same(followed(head), followed(plain))


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("place", ["before forward", "before backward"])
def test_activation_checkpointing_around_the_head_changes_nothing(
    reentrant: bool, early_stop: bool, place: str
) -> None:
    heads = [stateful_head(sample_rate=0.5), stateful_head(sample_rate=0.5)]
    for head, checkpointed in zip(heads, (True, False), strict=True):
        optimizer = RowSGD(head.parameters(), lr=0.1)
        for number, (x, y) in enumerate((*two_batches(), *two_batches())):
            if place == "before forward":
                optimizer.zero_grad()

            def call(x: Tensor, y: Tensor = y, head: PartialFC = head) -> Tensor:
                return head(x * 2.0, y).loss * 3.0

            with set_checkpoint_early_stop(early_stop):
                loss = checkpoint(call, x, use_reentrant=reentrant) if checkpointed else call(x)
                if place == "before backward":
                    optimizer.zero_grad()
                loss.backward()
            if number != 1:  # a step that is skipped
                optimizer.step()
    assert same(followed(heads[0]), followed(heads[1]))
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert int(heads[0].step) == 4


@pytest.mark.parametrize("name", ["arcface", "curricularface", "adaface", "uce", "softmax", "magface"])
def test_inference_mode_gives_the_loss(name: str) -> None:
    head = PartialFC(CLASSES, DIM, make_loss(LOSSES[name]), center_loss=CenterLoss())
    x, y = small_batch()
    for mode in (head.train, head.eval):
        mode()
        expected = head(x, y).loss.detach()
        with torch.inference_mode():
            made_here = x * 1.0, y + 0
            for batch in ((x, y), made_here):
                loss = head(*batch).loss
                assert torch.equal(loss, expected)
                assert not loss.requires_grad
            rows = head.rows(y)
        assert torch.equal(rows, head.weight[y])
        assert torch.equal(head(*made_here).loss.detach(), expected), "also of tensors that were made there"
    assert int(head.step) == 0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(DIM, DIM, dtype=torch.float64), stateful_head()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.head(self.backbone(x).relu(), y).loss * 2.0
        return loss


def test_compilation_breaks_the_graph_at_the_head() -> None:
    plain = Model()
    model = copy.deepcopy(plain)
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)
    for each, call in ((plain, plain), (model, compiled)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for x, y in two_batches():
            call(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(followed(model.head), followed(plain.head))
    torch.testing.assert_close(model.backbone.weight, plain.backbone.weight)
    text = "".join(graph.print_readable(print_output=False) for graph in graphs)
    assert "linear" in text, "the backbone is compiled"
    assert "exp" not in text, "the head is not"
    assert len(graphs) <= 4, "before the head and after it, again where shapes change"


@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.half(),
        lambda module: module.to(torch.float16),
        lambda module: module.type(torch.float16),
        lambda module: module.to(torch.float8_e5m2),
    ],
    ids=["half", "to", "type", "float8"],
)
@pytest.mark.parametrize("around", [lambda head: head, lambda head: nn.Sequential(head)], ids=["head", "model"])
def test_a_head_in_float16_is_refused(convert: Callable[..., Any], around: Callable[..., Any]) -> None:
    head = stateful_head()
    with pytest.raises(ConfigError, match=r"float32, torch\.float64 or torch\.bfloat16, not torch\.float"):
        convert(around(head))
    assert {tensor.dtype for tensor in head.parameters()} == {torch.float64}
    assert head.float().weight.dtype is torch.float32
    assert head.bfloat16().weight.dtype is torch.bfloat16


def backbone_for(head: PartialFC, held: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    head.requires_grad_(False)
    torch.manual_seed(0)
    backbone = nn.Linear(DIM, DIM, dtype=torch.float64)
    parameters = [*backbone.parameters(), *(head.parameters() if held else [])]
    return backbone, torch.optim.SGD(parameters, lr=0.0)


@pytest.mark.parametrize("held", [True, False], ids=["in the optimizer", "in none"])
def test_all_of_a_frozen_head_moves_with_the_applied_steps_of_the_backbone(held: bool) -> None:
    head = stateful_head(sample_rate=0.5)
    backbone, optimizer = backbone_for(head, held)
    weight = head.weight.clone()
    first, second = two_batches()
    for x, y in (first, second):  # micro-batches
        head(backbone(x), y).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    expected = expected_after(weight, *((backbone(x), y) for x, y in (first, second)))
    assert same(followed(head), expected)
    head(backbone(first[0]), first[1]).loss.backward()
    optimizer.zero_grad()  # skipped
    head.state_dict()
    assert same(followed(head), expected)
    (head(backbone(first[0]), first[1]).loss + head(backbone(second[0]), second[1]).loss).backward()
    optimizer.step()
    assert followed(head)[0] == 2
    assert followed(head)[1] != expected[1]
    assert torch.equal(head.weight, weight)


@pytest.mark.parametrize("held", [True, False], ids=["in the optimizer", "in none"])
def test_a_frozen_head_whose_backbone_it_cannot_see_moves_with_its_optimizer_or_not_at_all(held: bool) -> None:
    head = stateful_head()
    backbone, optimizer = backbone_for(head, held)
    for x, y in two_batches():
        embeddings = backbone(x)
        leaf = embeddings.detach().requires_grad_()
        head(leaf, y).loss.backward()
        embeddings.backward(leaf.grad)
        optimizer.step()
        optimizer.zero_grad()
    step, t, centers = followed(head)
    assert (step, t != 0.0, bool(centers.any())) == ((2, True, True) if held else (0, False, False))
    assert len(head.center_loss.pending_offsets) <= 1, "nothing piles up"


def test_a_frozen_weight_leaves_the_bias_to_be_trained() -> None:
    head, free = (PartialFC(CLASSES, DIM, losses.Softmax()) for _ in range(2))
    head.weight.requires_grad_(False)
    optimizer = RowSGD(head.parameters(), lr=0.1)
    for each in (head, free):
        each(small_batch()[0].detach(), small_batch()[1]).loss.backward()
    assert head.weight.grad is None
    assert torch.equal(head.bias.grad.to_dense(), free.bias.grad.to_dense())
    optimizer.step()
    assert int(head.step) == 1


def test_heads_are_copied_and_pickled_while_a_step_is_under_way() -> None:
    head = stateful_head()
    first, second = two_batches()
    loss = head(*first).loss
    head(*second).loss.backward()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        other(*first).loss.backward()
        RowSGD(other.parameters()).step()
    loss.backward()
    RowSGD(head.parameters()).step()
    assert int(head.step) == 1
