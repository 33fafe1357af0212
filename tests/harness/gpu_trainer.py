"""Steps of the real trainer on the simulated GPU, by the command line: ``python -m tests.harness.gpu_trainer RUNS``.

RUNS is a JSON list of lists of overrides ``section.key=value``; printed is a JSON list of what :class:`Record` says of
each run's last step. The backbone is wrapped in DistributedDataParallel, as that of a run of two ranks.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the group "fake"
import yaml
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import partialfc.train.trainer
from partialfc.build.engine import build_engine
from partialfc.config import Config, parse_config
from partialfc.data.loader import LoaderSettings, build_loader, running
from partialfc.engines.base import Engine
from partialfc.engines.ddp import DdpEngine
from partialfc.runtime.process import ProcessContext
from partialfc.runtime.stopping import StopRequest
from partialfc.train.trainer import Trainer
from tests.harness.simulated_gpu import CUDA, SimulatedGpu, simulated_gpu
from tests.harness.tasks import write_task

STEPS = 4


@dataclass
class Record:
    """The last of a few steps."""

    waits: dict[str, int]  # by place
    waits_of_metrics: dict[str, int]  # by place: of what is noted after each step
    losses: list[float]  # of all steps
    losses_on_cpu: list[float]


def _averaged(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Any]:
    """The hook of DDP that averages a bucket over the ranks; the only one has the mean."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _build_engine(module: nn.Module, config: Config, process: ProcessContext) -> Engine:
    """Build the engine of the first of two ranks, the other of which never has an image."""
    with patch.object(default_hooks, "allreduce_hook", _averaged):
        return build_engine(module, config, dataclasses.replace(process, world_size=2))


def take_steps(folder: Path, overrides: list[str], gpu: SimulatedGpu | None) -> Record:
    """Train for a few steps; ``gpu`` keeps the record of the last one only."""
    tree = write_task(folder)
    tree["model"]["name"] = "tests.harness.backbones:normalized"
    tree["evaluation"]["sets"] = []
    tree["head"]["sample_rate"] = 1.0
    tree["checkpoint"] = {"asynchronous": False}  # needs no group of its own
    for override in overrides:
        place, value = override.split("=", 1)
        section, key = place.split(".")
        tree.setdefault(section, {})[key] = yaml.safe_load(value)
    config = parse_config(tree)
    process = ProcessContext(0, 1, torch.device("cpu") if gpu is None else CUDA, StopRequest(None))
    with patch.object(partialfc.train.trainer, "build_engine", _build_engine):
        trainer = Trainer(config, process)
    assert isinstance(trainer.engine, DdpEngine)
    assert isinstance(trainer.engine._wrapped, DistributedDataParallel)
    loader = build_loader(trainer.dataset, LoaderSettings.from_config(config, 0, 1), trainer.schedule.order, 0, STEPS)
    losses = []
    with running(loader) as batches:
        for batch in batches:
            if gpu is not None:
                batch = batch._replace(images=batch.images.pin_memory(), labels=batch.labels.pin_memory())
                gpu.forget()
            result = trainer.train_step(batch)
            waits = dict(gpu.waits) if gpu is not None else {}
            trainer.metrics.add(result.out, result.grad_norm, result.skipped)
            waits_of_metrics = dict(gpu.waits - Counter(waits)) if gpu is not None else {}
            trainer.step += 1
            losses.append(result.decision.loss)
    return Record(waits, waits_of_metrics, losses, [])


def record(overrides: list[str]) -> Record:
    """Take the steps on both devices."""
    with tempfile.TemporaryDirectory() as folder:
        with simulated_gpu() as gpu:
            of_gpu = take_steps(Path(folder) / "gpu", overrides, gpu)
        expected = take_steps(Path(folder) / "cpu", overrides, None)
    return dataclasses.replace(of_gpu, losses_on_cpu=expected.losses)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=1)
    print(json.dumps([dataclasses.asdict(record(overrides)) for overrides in json.loads(sys.argv[1])]))
