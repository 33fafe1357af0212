"""The same losses once more, dense, in float64, by torch autograd alone: what the sharded head must agree with.

Nothing here comes from the package. The formulas are those of the papers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def target_cosine_with_margin(name: str, cosine: Tensor, options: dict[str, Any]) -> Tensor:
    if name == "normface":
        return cosine
    if name == "cosface":
        return cosine - options.get("margin", 0.4)
    theta = torch.acos(cosine)
    if name == "arcface":
        m = options.get("margin", 0.5)
        return torch.where(theta + m <= math.pi, torch.cos(theta + m), cosine - m * math.sin(m))
    if name == "combined":
        m1, m2, m3 = options.get("m1", 1.0), options.get("m2", 0.5), options.get("m3", 0.0)
        start = math.cos((math.pi - m2) / m1)
        return torch.where(m1 * theta + m2 <= math.pi, torch.cos(m1 * theta + m2), -1 + (cosine - start)) - m3
    raise KeyError(name)


@dataclass
class Dense:
    loss: Tensor
    softmax_loss: Tensor
    center_loss: Tensor
    target_cosine: Tensor
    grad_embeddings: Tensor
    grad_weight: Tensor
    grad_bias: Tensor | None
    centers: Tensor | None  # after the update


def dense_head(
    name: str,
    options: dict[str, Any],
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    active: Tensor | None = None,
    centers: Tensor | None = None,
    center_weight: float = 0.0,
    center_alpha: float = 0.0,
    filter_threshold: float | None = None,
    hashed_only_weight: float = 1.0,
) -> Dense:
    """Loss, gradients and moved centers of the whole batch against all classes, in float64.

    ``active``: bool [C], the classes in the denominator. ``hashed_only_weight``: weight there of those that no sample
    of the batch belongs to.
    """
    x = embeddings.double().clone().requires_grad_()
    w = weight.double().clone().requires_grad_()
    b = None if bias is None else bias.double().clone().requires_grad_()
    counted = labels >= 0
    y = labels[counted]
    n = max(1, int(counted.sum()))
    unit_cosines = F.normalize(x) @ F.normalize(w).T
    own = F.one_hot(labels.clamp(min=0), len(w)).bool()
    if name == "softmax":
        logits = x @ w.T + (0 if b is None else b)
    else:
        s = options.get("scale", 64.0)
        target = target_cosine_with_margin(name, unit_cosines.gather(1, labels.clamp(min=0)[:, None]), options)
        logits = s * torch.where(own, target, unit_cosines)
    if active is not None:
        logits = logits.masked_fill(~(active | own), -math.inf)
    if filter_threshold is not None:
        logits = logits.masked_fill((unit_cosines > filter_threshold) & ~own, -math.inf)
    present = torch.zeros(len(w), dtype=torch.bool)
    present[y] = True
    logits = logits + torch.where(present, 0.0, math.log(hashed_only_weight))
    # −log p_y = log(1 + exp(lse of the others − z_y)); log_softmax would lose losses below 1e-16 even in float64.
    others = torch.logsumexp(logits.masked_fill(own, -math.inf), dim=1)
    d = (others - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0])[counted]
    d = d[~torch.isneginf(d)]  # no other class at all: no loss
    softmax_loss = torch.logaddexp(d, torch.zeros_like(d)).sum() / n
    center_loss = torch.zeros((), dtype=torch.float64)
    moved = None
    if centers is not None:
        k = centers.double().clone()
        center_loss = 0.5 * center_weight * (x[counted] - k[y]).square().sum() / n
        moved = k.clone()
        for j in y.unique():
            mine = x.detach()[counted][y == j]
            moved[j] = k[j] - center_alpha * (k[j] - mine).sum(0) / (1 + len(mine))
    loss = softmax_loss + center_loss
    (loss + 0 * (x.sum() + w.sum() + (0 if b is None else b.sum()))).backward()
    zero = torch.zeros((), dtype=torch.float64)
    cosine = unit_cosines.gather(1, labels.clamp(min=0)[:, None])[:, 0][counted]
    return Dense(
        loss.detach(),
        softmax_loss.detach(),
        center_loss.detach(),
        cosine.detach().mean() if len(cosine) else zero,
        x.grad,
        w.grad,
        None if b is None else b.grad,
        moved,
    )


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max |value − reference| / max |reference|."""
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    error = float((value.double() - reference).abs().max()) if reference.numel() else 0.0
    return error / scale if scale > 1e-30 else error
