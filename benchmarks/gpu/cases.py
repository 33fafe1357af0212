"""Three training steps of the head in one setting, to be compared between devices and precisions.

The batches are those of a run in progress: target cosines of 0.3, 0.9 and 0.98 beside random ones, classes that look
alike, an ignored sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from partialfc import CenterLoss, PartialFC, RowAdagrad, RowAdamW, RowSGD, losses

STEPS = 3
_TARGET_COSINES = (0.3, 0.9, 0.98, None)  # taken in turn by the samples; None: random
_LOOK_ALIKES = 10  # pairs of classes with a cosine of 0.9

LossMaker = Callable[[], losses.Loss]
OptimizerMaker = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Sizes:
    classes: int
    dim: int
    batch: int
    budget_mb: float = 2.0  # small enough for several chunks


USUAL = Sizes(2003, 96, 64)
SMALL = Sizes(301, 32, 16, 0.1)
WIDE = Sizes(20_000, 512, 256, 32.0)  # products large enough for the kernels of real runs


@dataclass(frozen=True)
class Case:
    name: str
    loss: LossMaker = losses.ArcFace
    rate: float = 1.0
    optimizer: OptimizerMaker = RowSGD
    weight_dtype: torch.dtype = torch.float32
    center_loss: bool = False
    micro_batches: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    sizes: Sizes | None = None  # default: the caller's
    tolerance: float = 0.0  # where a correct result may lie further off than usual


@dataclass(frozen=True)
class Outcome:
    """Results of a case, all in float64 on the CPU."""

    loss: Tensor  # [micro-batches of all steps]
    embedding_gradient: Tensor  # [the same, B, D]
    weight: Tensor  # after the last step
    active_rows: list[int]

    def errors(self, expected: Outcome) -> dict[str, float]:
        """Return the distance from ``expected``: the largest difference over the largest expected number, of each."""
        if self.active_rows != expected.active_rows:
            return {"loss": math.inf, "embedding gradient": math.inf, "weight": math.inf}
        return {
            "loss": _distance(self.loss, expected.loss),
            "embedding gradient": _distance(self.embedding_gradient, expected.embedding_gradient),
            "weight": _distance(self.weight, expected.weight),
        }


def _distance(found: Tensor, expected: Tensor) -> float:
    distance = float((found - expected).abs().max() / expected.abs().max())
    return math.inf if math.isnan(distance) else distance


def loss_makers() -> dict[str, LossMaker]:
    """Return every loss by name, with wrappers around a fitting one."""
    wrapped: dict[str, LossMaker] = {
        "subcenter": losses.UCE,
        "focal": losses.ArcFace,
        "label_smoothing": losses.ArcFace,
    }

    def make(name: str) -> losses.Loss:
        kind: Any = losses.BY_NAME[name]
        return kind(loss=wrapped[name]()) if name in wrapped else kind()

    return {name: partial(make, name) for name in losses.BY_NAME}


def all_cases() -> Iterator[Case]:
    """Yield every loss, optimizer and option, with all classes and with sampled ones."""
    bfloat16 = torch.bfloat16
    for rate in (1.0, 0.1):
        for name, maker in loss_makers().items():
            yield Case(f"{name}, rate {rate}", maker, rate)
        at = partial(Case, rate=rate)
        yield at(f"decayed rows, rate {rate}", optimizer=partial(RowSGD, unsampled_rows="decayed"))
        yield at(f"nesterov, rate {rate}", optimizer=partial(RowSGD, nesterov=True))
        # Adam's step depends on little but the signs of small gradients: rounding decides some of them.
        yield at(f"RowAdamW, rate {rate}", optimizer=partial(RowAdamW, lr=1e-3), tolerance=5e-3)
        yield at(f"RowAdagrad, rate {rate}", optimizer=partial(RowAdagrad, lr=1e-2), tolerance=5e-3)
        yield at(f"bf16 weight, rate {rate}", weight_dtype=bfloat16, tolerance=2e-2)
        yield at(
            f"bf16 weight, RowAdamW, rate {rate}",
            weight_dtype=bfloat16,
            optimizer=partial(RowAdamW, lr=1e-3),
            tolerance=2e-2,
        )
        yield at(f"center loss, rate {rate}", center_loss=True)
        yield at(f"two micro-batches, rate {rate}", micro_batches=2, center_loss=True)
        yield at(f"filter_threshold, rate {rate}", options={"filter_threshold": 0.6})
        yield at(f"correct_sampling, rate {rate}", options={"correct_sampling": True})


def wide_cases() -> Iterator[Case]:
    """Yield ArcFace at an embedding dimension of real runs."""
    for rate in (1.0, 0.1):
        yield Case(f"dim {WIDE.dim}, rate {rate}", rate=rate, sizes=WIDE)


def run_case(
    case: Case, sizes: Sizes, device: torch.device | str, exact: bool, options: dict[str, Any] | None = None
) -> Outcome:
    """Train for :data:`STEPS` steps on ``device``; in float64 throughout if ``exact``, but for a bfloat16 weight."""
    sizes = case.sizes or sizes
    generator = torch.Generator().manual_seed(5)
    weight_dtype = torch.float64 if exact and case.weight_dtype is torch.float32 else case.weight_dtype
    head = PartialFC(
        sizes.classes,
        sizes.dim,
        case.loss(),
        sample_rate=case.rate,
        center_loss=CenterLoss(weight=0.1) if case.center_loss else None,
        weight_dtype=weight_dtype,
        compute_dtype=torch.float64 if exact else None,
        memory_budget_mb=sizes.budget_mb,
        device=device,
        **case.options,
        **(options or {}),
    )
    weight = 0.3 * torch.randn(head.weight.shape, generator=generator)
    _make_look_alikes(weight, generator)
    with torch.no_grad():
        head.weight.copy_(weight)
    optimizer = case.optimizer(list(head.parameters()))
    found_losses, gradients, active_rows = [], [], []
    for _ in range(STEPS):
        for _ in range(case.micro_batches):
            x, y = _batch(weight, sizes.batch, generator)
            x = (x.double() if exact else x).to(device).requires_grad_()
            out = head(x, y.to(device))
            out.loss.backward()
            assert x.grad is not None
            found_losses.append(out.loss.detach().cpu().double())
            gradients.append(x.grad.cpu().double())
            active_rows.append(out.active_rows)
        optimizer.step()
        optimizer.zero_grad()
    head.apply_deferred_decay()
    return Outcome(torch.stack(found_losses), torch.stack(gradients), head.weight.detach().cpu().double(), active_rows)


def _make_look_alikes(weight: Tensor, generator: torch.Generator) -> None:
    """Give each of the first classes a twin right after it, cosine 0.9."""
    for first in range(0, 2 * _LOOK_ALIKES, 2):
        noise = torch.randn(weight[first].shape, generator=generator) * 0.3
        weight[first + 1] = 0.9 * weight[first] + math.sqrt(1 - 0.9**2) * noise


def _batch(weight: Tensor, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return embeddings [B, D] float32 and labels [B]: half of them of look-alike classes, one ignored."""
    labels = torch.randint(0, len(weight), (batch,), generator=generator)
    labels[: batch // 2] %= 2 * _LOOK_ALIKES
    own = weight[labels] if weight.dim() == 2 else weight[labels][:, 0]
    own = torch.nn.functional.normalize(own, dim=1)
    other = torch.randn(own.shape, generator=generator)
    other = torch.nn.functional.normalize(other - (other * own).sum(1, keepdim=True) * own, dim=1)
    drawn = torch.rand(batch, generator=generator) * 0.4 - 0.2
    cosines = [_TARGET_COSINES[i % len(_TARGET_COSINES)] for i in range(batch)]
    cosine = torch.tensor([float(drawn[i]) if c is None else c for i, c in enumerate(cosines)])[:, None]
    lengths = 5 + 35 * torch.rand(batch, 1, generator=generator)
    labels[3] = -1
    return lengths * (cosine * own + (1 - cosine.square()).sqrt() * other), labels
