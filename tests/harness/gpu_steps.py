"""Steps of a head on the simulated GPU, by the command line: ``python -m tests.harness.gpu_steps SETTINGS``.

SETTINGS is a JSON list of :class:`Settings`; printed is a JSON list of what :class:`Record` says of each.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partialfc import CenterLoss, PartialFC, RowAdagrad, RowAdamW, RowSGD
from partialfc.head.softmax.products import Precision
from tests.harness.loss_cases import LOSSES, make_loss
from tests.harness.simulated_gpu import SimulatedGpu, simulated_gpu, to_cpu, to_gpu

# With fewer classes to sample from, a list of the sampled rows would have too many places left over.
CLASSES, CLASSES_TO_SAMPLE, DIM, BATCH, STEPS = 1500, 20_000, 16, 24, 3
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: RowSGD(parameters, lr=0.1),
    "sgd, decayed": lambda parameters: RowSGD(parameters, lr=0.1, unsampled_rows="decayed"),
    "adamw": lambda parameters: RowAdamW(parameters, lr=0.01),
    "adagrad": lambda parameters: RowAdagrad(parameters, lr=0.01, weight_decay=1e-4),
}


@dataclass(frozen=True)
class Settings:
    """A head, its optimizer, and what surrounds a step."""

    loss: str = "arcface"
    sample_rate: float = 0.1
    optimizer: str = "sgd"
    precision: Precision | None = None
    center_loss: bool = False
    correct_sampling: bool = False
    filter_threshold: float | None = None
    bfloat16: bool = False
    micro_batches: int = 1
    memory_budget_mb: float = 0.3
    classes: int | None = None  # default: as many as the sample rate needs
    read_loss: bool = False  # after backward: a wait, for the record to show

    @property
    def num_classes(self) -> int:
        return self.classes or (CLASSES_TO_SAMPLE if self.sample_rate < 1 else CLASSES)


@dataclass
class Record:
    """Result of the last step, and the distance of the weight from that of the same steps on a CPU."""

    waits: dict[str, int]  # by place
    event_waits: int
    launches: int
    places: dict[str, int] = field(repr=False)  # of launches
    error: float


def take_steps(settings: Settings, gpu: SimulatedGpu | None) -> Tensor:
    """Return the weight after the steps, on the CPU; ``gpu`` keeps the record of the last one only."""
    generator = torch.Generator().manual_seed(5)
    head = PartialFC(
        settings.num_classes,
        DIM,
        make_loss(LOSSES[settings.loss]),
        sample_rate=settings.sample_rate,
        center_loss=CenterLoss() if settings.center_loss else None,
        correct_sampling=settings.correct_sampling,
        filter_threshold=settings.filter_threshold,
        weight_dtype=torch.bfloat16 if settings.bfloat16 else torch.float32,
        matmul_precision=settings.precision or "exact",
        memory_budget_mb=settings.memory_budget_mb,
        device="cpu" if gpu is None else "cuda",
    )
    optimizer = OPTIMIZERS[settings.optimizer](head.parameters())
    for _ in range(STEPS):
        if gpu is not None:
            gpu.forget()
        for _ in range(settings.micro_batches):
            embeddings = torch.randn(BATCH, DIM, generator=generator)
            labels = torch.randint(0, settings.num_classes, (BATCH,), generator=generator)
            labels[3] = -1
            if gpu is not None:
                embeddings, labels = to_gpu(embeddings), to_gpu(labels)
            out = head(embeddings.requires_grad_(), labels)
            (out.loss / settings.micro_batches).backward()
            if settings.read_loss:
                float(out.loss)
        head.gradient_is_finite()
        optimizer.step()
        optimizer.zero_grad()
    weight = head.weight.detach()
    return weight.float() if gpu is None else to_cpu(weight).float()


def record(settings: Settings) -> Record:
    """Take the steps on both devices."""
    with simulated_gpu() as gpu:
        weight = take_steps(settings, gpu)
        waits, places = dict(gpu.waits), dict(gpu.launches)
        event_waits, launches = sum(gpu.event_waits.values()), sum(gpu.launches.values())
    expected = take_steps(settings, None)
    error = float((weight - expected).abs().max() / expected.abs().max())
    return Record(waits, event_waits, launches, places, error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([dataclasses.asdict(record(Settings(**settings))) for settings in json.loads(sys.argv[1])]))
