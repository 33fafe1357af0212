"""The head within a training loop: its counter, skipped steps, accumulation, optimizers, autocast, saving."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from partialfc import CenterLoss, PartialFC, RowSGD, losses
from tests.harness.ranks import Ranks
from tests.harness.rows import CLASSES, DIM, small_batch, small_head


def test_counter_advances_once_per_optimizer_step_and_never_in_evaluation() -> None:
    head = small_head(sample_rate=0.3)
    optimizer = RowSGD(head.parameters())
    for step in range(3):
        assert int(head.step) == step
        for micro_batch in range(2):
            head(*small_batch(micro_batch)).loss.backward()
            assert int(head.step) == step, "micro-batches share the step"
        optimizer.step()
        optimizer.zero_grad()
    head.eval()
    head(*small_batch()).loss.backward()
    optimizer.step()
    assert int(head.step) == 3
    assert head.state_dict()["step"] == 3


def test_micro_batches_of_one_step_share_their_negatives_and_steps_do_not() -> None:
    head = small_head(sample_rate=0.3)
    optimizer = RowSGD(head.parameters())
    x, y = small_batch()
    drawn = []
    for _ in range(2):
        for _ in range(2):
            head(x, y).loss.backward()
        rows = head.weight.grad.coalesce().indices()[0].tolist()
        head.zero_grad()
        head(x, y, step=int(head.step)).loss.backward()
        assert head.weight.grad.coalesce().indices()[0].tolist() == rows
        drawn.append(rows)
        optimizer.step()
        optimizer.zero_grad()
    assert drawn[0] != drawn[1]


def test_evaluation_uses_all_classes_without_accumulating_centers() -> None:
    head = small_head(sample_rate=0.1, center_loss=CenterLoss()).eval()
    out = head(*small_batch())
    assert out.active_rows == CLASSES
    out.loss.backward()
    assert head.center_loss._pending == []


def test_a_skipped_step_advances_the_counter_once_and_drops_the_centers() -> None:
    head = small_head(center_loss=CenterLoss(alpha=0.5), sample_rate=0.5)
    optimizer = RowSGD(head.parameters())
    head(*small_batch()).loss.backward()
    optimizer.zero_grad()  # what a loss scaler does after an overflow: no step
    centers, weight = head.center_loss.centers.clone(), head.weight.detach().clone()
    head(*small_batch(1)).loss.backward()
    assert int(head.step) == 1
    assert torch.equal(head.center_loss.centers, centers)
    assert torch.equal(head.weight, weight)
    optimizer.step()
    optimizer.zero_grad()
    assert int(head.step) == 2
    reference = small_head(center_loss=CenterLoss(alpha=0.5), sample_rate=0.5)
    reference(*small_batch(1)).loss.backward()
    RowSGD(reference.parameters()).step()
    assert torch.equal(head.center_loss.centers, reference.center_loss.centers), "only the applied step's samples"


@pytest.mark.parametrize("place", ["before forward", "before backward", "after step"])
def test_a_step_skipped_by_a_loss_scaler_counts_once_wherever_gradients_are_cleared(place: str) -> None:
    head, plain = (small_head(center_loss=CenterLoss(), on_nonfinite="propagate", sample_rate=0.5) for _ in range(2))
    optimizer, plain_optimizer = RowSGD(head.parameters(), lr=0.01), RowSGD(plain.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for seed in range(4):
        x, y = small_batch(seed)
        broken = x.detach().clone()
        if seed == 1:
            broken[0, 0] = float("inf")
        if place == "before forward":
            optimizer.zero_grad()
        out = head(broken.requires_grad_(), y, step=seed)
        if place == "before backward":
            optimizer.zero_grad()
        scaler.scale(out.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if place == "after step":
            optimizer.zero_grad()
        if seed != 1:
            plain(x, y, step=seed).loss.backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
    optimizer.zero_grad()
    assert head.state_dict()["step"] == 4
    torch.testing.assert_close(head.weight, plain.weight)
    torch.testing.assert_close(head.center_loss.centers, plain.center_loss.centers)


@pytest.mark.parametrize("loss", [losses.ArcFace(scale=16.0), losses.Softmax()], ids=["arcface", "softmax"])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
def test_weight_and_compute_dtype_may_differ(
    loss: losses.Loss, weight_dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    results = []
    for weight, compute in ((weight_dtype, compute_dtype), (torch.float64, torch.float64)):
        head = PartialFC(CLASSES, DIM, loss, 0.5, weight_dtype=weight, compute_dtype=compute, center_loss=CenterLoss())
        x, y = small_batch()
        out = head(x, y)
        out.loss.backward()
        assert (out.loss.dtype, head.weight.grad.dtype) == (compute, weight)
        gradient = head.weight.grad.to_dense().double()
        RowSGD(head.parameters()).step()
        results.append((out.loss.double(), x.grad.double(), gradient, head.weight.detach().double()))
    for mine, exact in zip(*results, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=2e-5)


def test_loading_forgets_what_the_batches_before_it_accumulated() -> None:
    head = small_head(center_loss=CenterLoss())
    saved = copy.deepcopy(head.state_dict())
    head(*small_batch()).loss.backward()
    head.load_state_dict(saved)
    RowSGD(head.parameters(), lr=0.0).step()
    assert float(head.center_loss.centers.abs().sum()) == 0.0


def test_a_head_made_on_the_meta_device_can_be_filled_later() -> None:
    arguments: dict[str, Any] = {"num_classes": CLASSES, "embedding_dim": DIM, "seed": 3}
    head = PartialFC(loss=losses.Softmax(), center_loss=CenterLoss(), device="meta", **arguments)
    head.to_empty(device="cpu")
    for tensor in (head.weight.data, head.bias.data, head.center_loss.centers, head.step):
        tensor.fill_(7)
    head.reset_parameters()
    made = PartialFC(loss=losses.Softmax(), center_loss=CenterLoss(), **arguments)
    for name, tensor in made.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor), name


def test_heads_can_be_pickled_and_copied() -> None:
    head = small_head(center_loss=CenterLoss())
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        other(*small_batch()).loss.backward()
        RowSGD(other.parameters()).step()
        assert (int(other.step), int(head.step)) == (1, 0)


def _copy_distributed_head(group: dist.ProcessGroup) -> bool:
    head = small_head(process_group=group)
    x, y = small_batch()
    return torch.equal(copy.deepcopy(head)(x, y).loss, head(x, y).loss)


def test_a_sharded_head_can_be_copied(ranks: Ranks) -> None:
    assert ranks.run(2, _copy_distributed_head) == [True, True]


def test_two_heads_in_one_model_keep_their_own_steps_and_centers() -> None:
    first, second = small_head(center_loss=CenterLoss()), small_head(center_loss=CenterLoss(), seed=1)
    optimizer = RowSGD([*first.parameters(), *second.parameters()])
    x, y = small_batch()
    (first(x, y).loss + second(x, y).loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    first(x, y).loss.backward()
    optimizer.step()
    assert (int(first.step), int(second.step)) == (2, 1)


def test_a_saved_head_knows_of_a_skipped_step() -> None:
    head = small_head()
    head(*small_batch()).loss.backward()
    head.zero_grad()
    assert head.state_dict()["step"] == 1


def test_grad_scaler_steps_and_skips() -> None:
    head = small_head(center_loss=CenterLoss(), on_nonfinite="propagate")
    optimizer = RowSGD(head.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plain = copy.deepcopy(head)
    plain_optimizer = RowSGD(plain.parameters(), lr=0.01)
    for seed in range(4):
        x, y = small_batch(seed)
        broken = x.detach().clone()
        if seed == 2:
            broken[0, 0] = float("inf")
        before = head.weight.detach().clone(), head.center_loss.centers.clone()
        scaler.scale(head(broken.requires_grad_(), y).loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if seed == 2:
            assert torch.equal(head.weight, before[0])
            assert torch.equal(head.center_loss.centers, before[1])
        else:
            plain(x, y).loss.backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
    assert head.state_dict()["step"] == 4
    torch.testing.assert_close(head.weight, plain.weight)
    torch.testing.assert_close(head.center_loss.centers, plain.center_loss.centers)


def test_the_head_follows_foreign_optimizers_too() -> None:
    head = small_head(center_loss=CenterLoss())
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    head(*small_batch()).loss.backward()
    optimizer.step()
    assert int(head.step) == 1
    assert float(head.center_loss.centers.abs().sum()) > 0


def test_an_optimizer_of_other_parameters_does_not_move_the_counter() -> None:
    head = small_head()
    other = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    head(*small_batch()).loss.backward()
    optimizer.step()
    assert int(head.step) == 0


def test_micro_batches_give_the_gradient_and_centers_of_one_large_batch() -> None:
    whole, parts = small_head(center_loss=CenterLoss()), small_head(center_loss=CenterLoss())
    x, y = small_batch(batch=12)
    whole(x, y).loss.backward()
    for start, stop in ((0, 3), (3, 12)):
        out = parts(x[start:stop], y[start:stop])
        (out.loss * out.num_samples / 12).backward()
    torch.testing.assert_close(parts.weight.grad.to_dense(), whole.weight.grad.to_dense(), rtol=1e-4, atol=1e-6)
    for head in (whole, parts):
        RowSGD(head.parameters(), lr=0.0).step()
    torch.testing.assert_close(parts.center_loss.centers, whole.center_loss.centers)


def test_autocast_does_not_reach_into_the_head() -> None:
    head = small_head()
    x, y = small_batch()
    plain = head(x, y)
    plain.loss.backward()
    expected = x.grad.clone()
    x.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(x, y)
        out.loss.backward()
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(x.grad, expected)


def _bfloat16_embeddings(group: dist.ProcessGroup) -> tuple[float, float, torch.dtype]:
    x, y = small_batch()
    low = x.detach().bfloat16().requires_grad_()
    losses_of = []
    for embeddings in (low, low.detach().float().requires_grad_()):
        head = small_head(process_group=group)
        out = head(embeddings, y)
        out.loss.backward()
        losses_of.append(float(out.loss))
    return losses_of[0], losses_of[1], low.grad.dtype


def test_embeddings_in_bfloat16_are_computed_with_in_float32(ranks: Ranks) -> None:
    for low, full, dtype in ranks.run(2, _bfloat16_embeddings):
        assert low == full
        assert dtype is torch.bfloat16


def test_a_frozen_head_gives_gradients_to_the_backbone_only() -> None:
    head, free = small_head(sample_rate=0.5), small_head(sample_rate=0.5)
    head.weight.requires_grad_(False)
    x, y = small_batch()
    head(x, y).loss.backward()
    frozen = x.grad.clone()
    assert head.weight.grad is None
    x.grad = None
    free(x, y).loss.backward()
    assert torch.equal(x.grad, frozen)


def test_a_frozen_backbone_trains_the_head() -> None:
    head = small_head()
    x, y = small_batch()
    head(x.detach(), y).loss.backward()
    assert float(head.weight.grad.to_dense().abs().sum()) > 0


def test_no_gradient_work_without_gradients() -> None:
    head = small_head(center_loss=CenterLoss())
    with torch.no_grad():
        out = head(*small_batch())
    assert not out.loss.requires_grad
    assert head.center_loss._pending == []


def test_backward_twice_through_a_retained_graph_doubles_the_gradient() -> None:
    head = small_head()
    out = head(*small_batch())
    out.loss.backward(retain_graph=True)
    once = head.weight.grad.to_dense().clone()
    out.loss.backward()
    torch.testing.assert_close(head.weight.grad.to_dense(), 2 * once)


def test_weights_changed_between_forward_and_backward_are_noticed() -> None:
    head = small_head()
    out = head(*small_batch())
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def _norms(group: dist.ProcessGroup) -> float:
    head = small_head(process_group=group, seed=1)
    x, y = small_batch()
    parts = x.tensor_split(dist.get_world_size(group))[dist.get_rank(group)]
    labels = y.tensor_split(dist.get_world_size(group))[dist.get_rank(group)]
    head(parts, labels).loss.backward()
    return float(head.grad_norm())


def test_grad_norm_is_that_of_all_shards(ranks: Ranks) -> None:
    alone = ranks.run(1, _norms)[0]
    assert alone > 0
    for world_size in (2, 3, 4):
        assert ranks.run(world_size, _norms) == pytest.approx([alone] * world_size, rel=1e-5)


def test_state_dict_restores_weights_centers_and_counter() -> None:
    head = small_head(center_loss=CenterLoss(), sample_rate=0.3)
    optimizer = RowSGD(head.parameters())
    head(*small_batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    other = small_head(center_loss=CenterLoss(), sample_rate=0.3, seed=0)
    other.load_state_dict(head.state_dict())
    with torch.no_grad():
        assert torch.equal(other(*small_batch(1)).loss, head(*small_batch(1)).loss)
    assert int(other.step) == 1


def test_importing_the_package_loads_torch_only() -> None:
    heavy = "deepspeed wandb webdataset typer rich pydantic yaml PIL matplotlib fontTools onnx safetensors"
    names = "import sys; from partialfc import CenterLoss, PartialFC, RowSGD, losses"
    code = f"{names}; print([name for name in {heavy.split()!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
