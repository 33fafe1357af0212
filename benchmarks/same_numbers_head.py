"""The head's part of same_numbers.py: steps of every loss and option, run with the checkout that PYTHONPATH names.

    torchrun --nproc-per-node 2 benchmarks/same_numbers_head.py OUT     # writes OUT/rank0.json, OUT/rank1.json

Each case is a list of lines ``{"where": "step 2", "values": {…}}``. Numbers are written whole, tensors as a digest of
their bytes. Ranks get uneven parts of the batch and of the classes, one sample of a batch is ignored, and the learning
rate changes from step to step.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partialfc import CenterLoss, LinearRate, PartialFC, RowAdagrad, RowAdamW, RowSGD, losses

CLASSES, DIM, BATCH, FIRST_RANK, STEPS = 101, 16, 24, 13, 5
LR = 0.1

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
Line = dict[str, Any]

ARCFACE = {"name": "arcface", "scale": 16.0, "margin": 0.2}
OPTIMIZERS: dict[str, Make] = {
    "RowSGD": lambda groups: RowSGD(groups, LR),
    "RowSGD decayed": lambda groups: RowSGD(groups, LR, unsampled_rows="decayed"),
    "RowSGD Nesterov decayed": lambda groups: RowSGD(groups, LR, nesterov=True, unsampled_rows="decayed"),
    "RowSGD bf16": lambda groups: RowSGD(groups, LR, state_dtype=torch.bfloat16),
    "RowAdamW": lambda groups: RowAdamW(groups, 1e-2),
    "RowAdamW bf16": lambda groups: RowAdamW(groups, 1e-2, state_dtype=torch.bfloat16),
    "RowAdagrad": lambda groups: RowAdagrad(groups, LR),
}


@dataclass(frozen=True)
class Case:
    """A head, its optimizer, and its inputs."""

    loss: dict[str, Any] = field(default_factory=lambda: ARCFACE)
    sample_rate: Any = 0.3
    optimizer: str = "RowSGD"
    options: dict[str, Any] = field(default_factory=dict)  # of the head
    center: bool = False
    micro_batches: int = 1
    dtype: torch.dtype = torch.float32  # of the embeddings


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    found = {}
    for name, kind in losses.BY_NAME.items():
        wraps = "loss" in inspect.signature(kind).parameters
        for rate in (1.0, 0.3):
            loss = {"name": name, "loss": ARCFACE} if wraps else {"name": name}
            found[f"{name}, rate {rate:g}"] = Case(loss, rate)
    half = {"weight_dtype": torch.bfloat16}
    stateful = {"name": "subcenter", "sub_centers": 2, "loss": {"name": "curricularface", "scale": 16.0}}
    return found | {
        "straight-through margin": Case(ARCFACE | {"margin_gradient": "straight_through"}),
        "all three margins": Case({"name": "combined", "scale": 16.0, "m1": 1.1, "m2": 0.1, "m3": 0.1}),
        "annealed A-Softmax": Case({"name": "a_softmax", "scale": 16.0, "annealing_rate": 50.0}),
        "ElasticFace plus": Case({"name": "elastic_arcface", "plus": True}),
        "sub-centers of CurricularFace": Case(stateful),
        "smoothed Softmax": Case({"name": "label_smoothing", "loss": {"name": "softmax"}}),
        "correct_sampling": Case(options={"correct_sampling": True}),
        "correct_sampling of Softmax": Case({"name": "softmax"}, options={"correct_sampling": True}),
        "filter_threshold": Case(options={"filter_threshold": 0.2}),
        "filter_threshold of Circle": Case({"name": "circle"}, 1.0, options={"filter_threshold": 0.2}),
        "center loss": Case(center=True),
        "rate from 0.1 to 1": Case(sample_rate=LinearRate(0.1, 1.0, STEPS)),
        "a small memory budget": Case(sample_rate=1.0, options={"memory_budget_mb": 0.002}),
        "a small memory budget of Circle": Case({"name": "circle"}, options={"memory_budget_mb": 0.002}),
        "float64": Case(options={"weight_dtype": torch.float64}, dtype=torch.float64),
        "bf16 embeddings": Case(dtype=torch.bfloat16),
        "bf16 weight": Case(options=half),
        "bf16 weight and momentum": Case(options=half, optimizer="RowSGD bf16"),
        "bf16 weight, RowAdamW": Case(options=half, optimizer="RowAdamW bf16"),
        "bf16 weight, RowAdagrad": Case(options=half, optimizer="RowAdagrad"),
        "three micro-batches": Case(stateful, center=True, micro_batches=3),
        **{optimizer: Case(optimizer=optimizer) for optimizer in OPTIMIZERS if optimizer not in ("RowSGD",)},
        "RowSGD decayed, Softmax": Case({"name": "softmax"}, optimizer="RowSGD decayed"),
    }


def main() -> None:
    """Run the cases whose names contain the given words, all by default."""
    out, words = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    found = {name: run(case) for name, case in cases().items() if words in name}
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of the process group may never end


def run(case: Case) -> list[Line]:
    """Return the results of a few steps of a case on this rank."""
    torch.manual_seed(0)
    center = CenterLoss(weight=0.01, alpha=0.5) if case.center else None
    head = PartialFC(CLASSES, DIM, make_loss(case.loss), case.sample_rate, seed=5, center_loss=center, **case.options)
    rows = [parameter for parameter in (head.weight, head.bias) if parameter is not None]
    groups: list[dict[str, Any]] = [{"params": rows}]
    if of_loss := list(head.loss.parameters()):
        groups.append({"params": of_loss, "weight_decay": 0.0})
    optimizer = OPTIMIZERS[case.optimizer](groups)
    lines = [{"where": "the start", "values": {"weight": digest(head.weight)}}]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] *= step / (step + 1) if step else 1.0
        values: dict[str, Any] = {}
        for part in range(case.micro_batches):
            embeddings, labels = batch(step * case.micro_batches + part, case.dtype)
            out = head(embeddings, labels)
            (out.loss / case.micro_batches).backward()
            of_part = {**numbers_of(out), "embeddings' gradient": digest(embeddings.grad)}
            mark = f" of part {part}" if case.micro_batches > 1 else ""
            values |= {f"{name}{mark}": value for name, value in of_part.items()}
        values["gradient's norm"] = head.grad_norm().item()
        values |= {f"gradient of {name}": digest(value.grad) for name, value in head.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"where": f"step {step + 1}", "values": values})
    return [*lines, {"where": "the end", "values": at_the_end(head, optimizer, case.dtype)}]


def numbers_of(out: Any) -> dict[str, float]:
    """Return the numbers of the head's output."""
    names = ("loss", "softmax_loss", "center_loss", "target_cosine", "num_samples", "active_rows")
    found = {name: getattr(out, name) for name in names}
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in found.items()}


def at_the_end(head: PartialFC, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> dict[str, Any]:
    """Return evaluation losses, rows read through the head, and digests of all that is saved."""
    head.eval()
    with torch.no_grad():
        out = head(*batch(1000, dtype))
    values: dict[str, Any] = {f"evaluated {name}": value for name, value in numbers_of(out).items()}
    values["rows"] = digest(head.rows(torch.arange(0, CLASSES, 7)))
    values |= {f"head {name}": digest(value) for name, value in head.state_dict().items() if value is not None}
    for number, state in optimizer.state_dict()["state"].items():
        values |= {f"optimizer {number} {name}": digest(value) for name, value in state.items()}
    return values


def make_loss(tree: dict[str, Any]) -> losses.Loss:
    """Build a loss from its name and options, as configs give them."""
    options: dict[str, Any] = {
        name: make_loss(value) if name == "loss" else value for name, value in tree.items() if name != "name"
    }
    return losses.BY_NAME[tree["name"]](**options)


def batch(number: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return this rank's part of a global batch: noisy copies of one vector per class."""
    of_classes = 8 * torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(100 + number)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    embeddings = of_classes[labels] + 4 * torch.randn(BATCH, DIM, generator=generator)
    labels[3] = -1
    alone = dist.get_world_size() == 1
    mine = slice(0, BATCH if alone else FIRST_RANK) if dist.get_rank() == 0 else slice(FIRST_RANK, BATCH)
    return embeddings[mine].to(dtype).requires_grad_(), labels[mine]


def digest(value: Any) -> str:
    """Return the digest of a tensor's type, shape and bytes; other values as text."""
    if not isinstance(value, Tensor):
        return repr(value)
    value = value.detach()
    parts: Iterable[Tensor] = [value]
    if value.is_sparse:
        value = value.coalesce()
        parts = [value.indices(), value.values()]
    found = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    for part in parts:
        found.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    main()
