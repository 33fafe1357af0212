"""Batch normalisation sees images of the data set only, and takes no statistics from fewer than two of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from partialfc.build.engine import build_engine
from partialfc.config import parse_config
from partialfc.engines.batch_norm import BatchNormModes
from partialfc.models.eval_mode import eval_mode
from partialfc.runtime.process import ProcessContext
from partialfc.runtime.stopping import StopRequest
from tests.harness.backbones import normalized
from tests.harness.running import run

ALONE = ProcessContext(0, 1, torch.device("cpu"), StopRequest(None))


def statistics(module: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in module.named_buffers()}


def test_statistics_come_from_two_images_or_more() -> None:
    torch.manual_seed(0)
    backbone = normalized(6, 1, 4)
    engine = build_engine(backbone, parse_config({"data": {"train": "x"}}), ALONE)
    images = torch.randn(7, 1, 4, 4)
    for count in (0, 1, 2, 5):
        engine.begin_step(0.1)
        before, alike = statistics(backbone), copy.deepcopy(backbone).train(count >= 2)
        embeddings = engine.forward(images[:count], 7)
        torch.testing.assert_close(embeddings, alike(images[:count]))
        engine.backward(embeddings, torch.ones_like(embeddings), last=True)
        assert all(engine.finish_backward()), "finite"
        engine.step()
        assert all(torch.equal(before[name], value) for name, value in statistics(backbone).items()) == (count < 2)


def test_who_counts_are_the_images_that_the_statistics_are_of() -> None:
    frozen = nn.BatchNorm2d(3).eval()
    module = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3), frozen)
    modes = BatchNormModes(module)
    for images, of_all_ranks, local, synchronised in ((0, 9, False, True), (1, 1, False, False), (2, 2, True, True)):
        modes.choose(images, of_all_ranks)
        assert (module[0].training, module[1].training, frozen.training) == (local, synchronised, False)
        with eval_mode(module):
            assert not any(part.training for part in module.modules())
        assert (module[0].training, module[1].training, frozen.training) == (local, synchronised, False)


ENGINES = {"ddp": [], **{f"zero{stage}": ["engine.name=deepspeed", f"engine.zero_stage={stage}"] for stage in range(4)}}


def backbone_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith("backbone.")
    }
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[] if name in ("ddp", "zero3") else pytest.mark.slow) for name in ENGINES]
)
def test_the_only_image_of_a_last_batch_trains_weights_and_no_statistics(task: Path, engine: str) -> None:
    if engine != "ddp":
        pytest.importorskip("deepspeed")
    folder = task.parent / f"single-{engine}"
    model = "model.name=tests.harness.backbones:normalized"
    batches = ["data.global_batch_size=221", "optim.accumulation=2", "optim.epochs=1", "optim.warmup=0"]
    keep = ["checkpoint.every=1", "checkpoint.keep_last=9", "evaluation.every=0"]
    done = run(task, 2, f"run.dir={folder}", model, *ENGINES[engine], *batches, *keep)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (backbone_of(folder / "checkpoints" / f"step-{step:08d}") for step in (1, 2))
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if "running_" in name or "num_batches" in name}
    assert before["backbone.2.running_mean"].abs().max() > 0, "the first batch has statistics"
