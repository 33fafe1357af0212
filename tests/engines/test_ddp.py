"""The plain torch engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from partialfc.config import parse_config
from partialfc.engines.ddp import DdpEngine
from partialfc.runtime.process import ProcessContext
from partialfc.runtime.stopping import StopRequest
from tests.harness.ranks import MOST_RANKS, Ranks
from tests.harness.running import run


def test_an_exception_does_not_leave_evaluation_mode_or_autocast_behind() -> None:
    backbone = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout())
    config = parse_config({"data": {"train": "x"}, "engine": {"precision": "bf16"}})
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    engine = DdpEngine(backbone, optimizer, config, ProcessContext(0, 1, torch.device("cpu"), StopRequest(None)))

    def evaluate_in_vain() -> None:
        with engine.evaluating() as module:
            assert not any(part.training for part in module.modules())
            assert torch.is_autocast_enabled("cpu")
            raise KeyError("while evaluating")

    with pytest.raises(KeyError):
        evaluate_in_vain()
    assert backbone.training
    assert backbone[1].training
    assert not torch.is_autocast_enabled("cpu")


def test_unused_and_frozen_parameters_are_named(short_task: Path, tmp_path: Path) -> None:
    folder = f"run.dir={tmp_path / 'run'}"
    unused = run(short_task, 2, "model.name=tests.harness.backbones:unused_first", folder)
    assert unused.returncode == 1
    assert "the forward pass does not use 1 trainable parameters" in unused.stderr
    assert "to average over ranks: first. Remove them, or freeze them" in unused.stderr
    assert run(short_task, 0, "model.name=tests.harness.backbones:unused_first", folder, "--force").returncode == 0
    frozen = run(short_task, 0, "model.name=tests.harness.backbones:frozen", f"run.dir={tmp_path / 'frozen'}")
    assert frozen.returncode == 2
    assert "backbones:frozen has no trainable parameter" in frozen.stderr


def _steps_of_three_micro_batches(group: dist.ProcessGroup, counts: list[list[int]]) -> tuple[int, int, torch.Tensor]:
    """Return how often two steps have averaged gradients and broadcast buffers, and the weight's gradient."""
    rank, averages, broadcasts = dist.get_rank(group), 0, 0
    allreduce, broadcast = default_hooks.allreduce_hook, dist.broadcast

    def counted_allreduce(*arguments: object) -> object:
        nonlocal averages
        averages += 1
        return allreduce(*arguments)

    def counted_broadcast(*arguments: object, **more: object) -> object:
        nonlocal broadcasts
        broadcasts += 1
        return broadcast(*arguments, **more)

    torch.manual_seed(1)
    backbone = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    sizes = {"data": {"train": "x", "global_batch_size": 12 * MOST_RANKS}, "optim": {"accumulation": 3, "clip": None}}
    config, process = parse_config(sizes), ProcessContext(rank, MOST_RANKS, torch.device("cpu"), StopRequest(None))
    try:
        default_hooks.allreduce_hook = counted_allreduce
        engine = DdpEngine(backbone, torch.optim.SGD(backbone.parameters(), lr=0.1), config, process)
        dist.broadcast = counted_broadcast
        for _ in range(2):
            engine.begin_step(0.0)
            torch.manual_seed(rank)
            for part, count in enumerate(counts[rank], start=1):
                of_all_ranks, last = sum(each[part - 1] for each in counts), part == len(counts[rank])
                embeddings = engine.forward(torch.randn(count, 5), of_all_ranks, last)
                engine.backward(embeddings, embeddings.detach().cos(), last)
            engine.finish_backward()
            weight = backbone[0].weight.grad
            assert weight is not None
            found = weight.clone()
            engine.optimizer.zero_grad()
    finally:
        default_hooks.allreduce_hook, dist.broadcast = allreduce, broadcast
    return averages, broadcasts, found


def _gradient_of_one_rank(counts: list[list[int]]) -> torch.Tensor:
    """Return the mean over the ranks of their micro-batches' gradients, without any engine."""
    torch.manual_seed(1)
    backbone = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    for rank, parts in enumerate(counts):
        torch.manual_seed(rank)
        for count in parts:
            embeddings = backbone(torch.randn(count, 5))
            embeddings.backward(embeddings.detach().cos() / len(counts))
    assert backbone[0].weight.grad is not None
    return backbone[0].weight.grad


def test_micro_batches_are_averaged_once_and_statistics_never_broadcast_for_training(ranks: Ranks) -> None:
    counts = [[4, 4, 4] for _ in range(MOST_RANKS)]
    expected = _gradient_of_one_rank(counts)
    for averages, broadcasts, gradient in ranks.run(MOST_RANKS, _steps_of_three_micro_batches, counts):
        assert (averages, broadcasts) == (2, 0)  # one bucket
        torch.testing.assert_close(gradient, expected)


def test_a_rank_without_two_images_gets_the_running_statistics_of_rank_0(ranks: Ranks) -> None:
    counts = [[4, 4, 4] for _ in range(MOST_RANKS - 1)] + [[4, 4, 1]]
    results = ranks.run(MOST_RANKS, _steps_of_three_micro_batches, counts)
    assert [broadcasts for _, broadcasts, _ in results] == [2] * MOST_RANKS, "with the last part of each step"
    for _, _, gradient in results[1:]:
        torch.testing.assert_close(gradient, results[0][2])
