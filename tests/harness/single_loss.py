"""A loss by itself: its curve over the cosines, and a small head in float64 around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from partialfc import PartialFC, losses

CLASSES, DIM = 17, 8
COSINES = torch.linspace(-1, 1, 4001, dtype=torch.float64)


def describe(count: int, norms: float | Tensor = 30.0, **more: Any) -> losses.Samples:
    """Samples as the head describes them, for ``count`` cosines."""
    ones = torch.ones(count, dtype=torch.float64)
    found = losses.Samples(norms * ones, ones.bool(), torch.arange(count), 0, 0, noise=0 * ones)
    return replace(found, **more)


def curve(loss: losses.Loss, samples: losses.Samples, cosines: Tensor = COSINES) -> tuple[Tensor, Tensor]:
    """Target logits and their slopes at ``cosines``."""
    variable = cosines.clone().requires_grad_()
    logit = loss.target_logit(variable, replace(samples, state=loss.stateful.state))
    return logit.detach(), torch.autograd.grad(logit.sum(), variable)[0]


def batch(seed: int = 0, n: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, DIM, generator=generator, dtype=torch.float64) * 5
    return x.requires_grad_(), torch.randint(0, CLASSES, (n,), generator=generator)


def head_of(loss: losses.Loss, **options: Any) -> PartialFC:
    return PartialFC(CLASSES, DIM, loss, weight_dtype=torch.float64, **options)
