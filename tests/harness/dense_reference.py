"""Dense float64 reference of all losses, by torch autograd alone, which the sharded head must match.

Nothing here comes from the package. The formulas are those of the papers, over whole [batch, classes] matrices. A loss
is described as in a config: ``{"name": "arcface", "margin": 0.3}``, wrappers with another description as ``loss``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Spec = dict[str, Any]
WRAPPERS = ("focal", "label_smoothing", "subcenter")
SCALES = {"circle": 256.0}  # where the default is not 64
INITIAL_STATE = {"curricularface": [0.0], "adaface": [20.0, 100.0]}


@dataclass
class Extras:
    """Inputs of a loss besides cosines."""

    state: Tensor | None = None  # before the step
    noise: Tensor | None = None  # [B]
    bias: Tensor | None = None  # UCE's b, [1], a leaf
    step: int = 0


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
    state: Tensor | None = None  # after the update
    grad_loss_bias: Tensor | None = None  # of UCE's b


@dataclass
class Negatives:
    """Selection of the negatives, and their weights."""

    active: Tensor | None = None  # bool [C]
    filter_threshold: float | None = None
    hashed_only_weight: float = 1.0  # of classes that no sample of the batch belongs to


@dataclass
class CenterTerm:
    centers: Tensor | None = None
    weight: float = 0.0
    alpha: float = 0.0


def base_of(spec: Spec) -> Spec:
    """The innermost loss of a description."""
    return base_of(spec["loss"]) if spec["name"] in WRAPPERS else spec


def sub_centers_of(spec: Spec) -> int | None:
    """K, or None."""
    if spec["name"] in ("subcenter", "subcenter_arcface"):
        return spec.get("sub_centers", 3)
    return sub_centers_of(spec["loss"]) if spec["name"] in WRAPPERS else None


def arc(c: Tensor, m: Tensor | float) -> Tensor:
    """cos(θ + m) by the addition theorem; ArcFace's continuation where θ + m > π."""
    m = torch.as_tensor(m, dtype=c.dtype)
    inside = c * torch.cos(m) - torch.sqrt(1 - c * c) * torch.sin(m)
    return torch.where(torch.acos(c.detach()) + m > math.pi, c - m * torch.sin(m), inside)


def target_cosine_with_margin(spec: Spec, c: Tensor, norms: Tensor, valid: Tensor, extras: Extras) -> Tensor:
    """ψ(c) of the target's cosine, [B]."""
    name, get = spec["name"], spec.get
    if name in ("normface",):
        return c
    if name in ("cosface", "mv_am_softmax"):
        return c - get("margin", 0.4 if name == "cosface" else 0.35)
    if name in ("arcface", "subcenter_arcface", "curricularface"):
        return arc(c, get("margin", 0.5))
    if name in ("sphereface", "combined"):
        m1 = get("margin", 1.35) if name == "sphereface" else get("m1", 1.0)
        m2, m3 = (0.0, 0.0) if name == "sphereface" else (get("m2", 0.5), get("m3", 0.0))
        theta, start = torch.acos(c), math.cos((math.pi - m2) / m1)
        return torch.where(m1 * theta + m2 <= math.pi, torch.cos(m1 * theta + m2), -1 + (c - start)) - m3
    if name == "a_softmax":
        m = get("margin", 4)
        # cos(mθ) as the Chebyshev polynomial of cos θ
        before, chebyshev = torch.ones_like(c), c
        for _ in range(m - 1):
            before, chebyshev = chebyshev, 2 * c * chebyshev - before
        k = torch.floor(torch.acos(c.detach()) / (math.pi / m))
        psi = (-1.0) ** k * chebyshev - 2 * k
        start, rate = get("annealing_start", 1000.0), get("annealing_rate", 0.12)
        lam = max(get("annealing_end", 5.0), start / (1 + rate * extras.step))
        return (lam * c + psi) / (1 + lam)
    if name == "magface":
        low, high = get("margin_low", 0.45), get("margin_high", 0.8)
        return arc(c, low + (high - low) / 100 * (norms.clamp(10, 110) - 10))
    if name == "adaface":
        m, h = get("margin", 0.4), get("concentration", 0.333)
        mean, std = extras.state
        z = (h * (norms.detach() - mean) / (std + 1e-3)).clip(-1, 1)
        theta = torch.acos(c) - m * z
        return torch.cos(theta.clamp(0, math.pi)) - m * (1 + z)
    if name in ("elastic_arcface", "elastic_cosface"):
        draws = get("margin", 0.5 if name == "elastic_arcface" else 0.35) + get("std", 0.0125) * extras.noise
        if get("plus", False):
            order = sorted((float(cosine), i) for i, cosine in enumerate(c.detach()) if valid[i])
            dealt = sorted((float(draw) for i, draw in enumerate(draws) if valid[i]), reverse=True)
            draws = draws.clone()
            for (_, i), draw in zip(order, dealt, strict=True):
                draws[i] = draw  # the smallest cosine gets the largest margin
        return arc(c, draws) if name == "elastic_arcface" else c - draws
    raise KeyError(name)


def advance(spec: Spec, state: Tensor | None, cosine: Tensor, norms: Tensor) -> Tensor | None:
    """The state after a batch with these target cosines and lengths (of the samples that count)."""
    name, alpha = spec["name"], spec.get("momentum", 0.01)
    if state is None or not len(cosine):
        return state
    if name == "curricularface":
        return (1 - alpha) * state + alpha * cosine.mean()
    mean = (1 - alpha) * state[0] + alpha * norms.mean()
    std = (1 - alpha) * state[1] + alpha * norms.std() if len(norms) > 1 else state[1]
    return torch.stack((mean, std))


def logits_of(
    spec: Spec, cosines: Tensor, own: Tensor, norms: Tensor, valid: Tensor, extras: Extras
) -> tuple[Tensor, Tensor]:
    """Target logits [B] and all logits as negatives [B, C]."""
    name = spec["name"]
    s = spec.get("scale", SCALES.get(name, 64.0))
    c = (cosines * own).sum(1)
    if name == "circle":
        m = spec.get("margin", 0.25)
        target = s * (1 + m - c).clamp(min=0).detach() * (c - (1 - m))
        return target, s * (cosines + m).clamp(min=0).detach() * (cosines - m)
    if name == "uce":
        return s * (c - spec.get("margin", 0.4)) - extras.bias, s * cosines - extras.bias
    target = s * target_cosine_with_margin(spec, c, norms, valid, extras)
    if spec.get("margin_gradient") == "straight_through":
        target = s * c + (target - s * c).detach()
    if name == "curricularface":
        theta = torch.acos(c.detach())
        hard = cosines > torch.cos(theta + spec.get("margin", 0.5))[:, None]
        return target, s * torch.where(hard, cosines * (extras.state[0] + cosines), cosines)
    if name == "mv_am_softmax":
        t = spec.get("emphasis", 1.12)
        hard = cosines > (c.detach() - spec.get("margin", 0.35))[:, None]
        return target, s * torch.where(hard, t * cosines + t - 1, cosines)
    return target, s * cosines


def sample_losses(spec: Spec, target: Tensor, negatives: Tensor, weights: Tensor, norms: Tensor) -> Tensor:
    """[B] from target logits [B], logits of all classes [B, C] and their weights as negatives [B, C], 0 = left out."""
    name = spec["name"]
    if name == "uce":
        terms = torch.logaddexp(negatives, torch.zeros_like(negatives))
        positive = torch.logaddexp(-target, torch.zeros_like(target))
        return positive + spec.get("negative_weight", 1.0) * (weights * terms).sum(1)
    if name == "focal":
        nll = sample_losses(spec["loss"], target, negatives, weights, norms)
        # 1 − p, from the negatives' share of the whole
        share = torch.softmax(torch.cat((target[:, None], negatives + weights.log()), 1), 1)[:, 1:].sum(1)
        share = torch.where(weights.sum(1) > 0, share, 1.0)  # without any other class the loss is 0 anyway
        return spec.get("alpha", 1.0) * share ** spec.get("gamma", 2.0) * nll
    if name == "label_smoothing":
        eps = spec.get("smoothing", 0.1)
        nll = sample_losses(spec["loss"], target, negatives, weights, norms)
        lse = nll + target
        n = 1 + weights.sum(1)
        smooth = ((lse - target) + (weights * (lse[:, None] - negatives)).sum(1)) / n  # −Σ log p_j / n
        return (1 - eps) * nll + eps * smooth
    if name == "subcenter":
        return sample_losses(spec["loss"], target, negatives, weights, norms)
    # −log p_y = log(1 + exp(lse of the others − z_y)); log_softmax would lose losses below 1e-16 even in float64.
    exist = weights.sum(1) > 0  # without any other class there is no loss
    d = torch.logsumexp(torch.where(exist[:, None], negatives + weights.log(), 0.0), dim=1) - target
    loss = torch.where(exist, torch.logaddexp(d, torch.zeros_like(d)), 0.0)
    if name == "magface":
        a = norms.clamp(10, 110)
        loss = loss + spec.get("penalty_weight", 20.0) * (1 / a + a / 110**2)
    return loss


def dense_head(
    spec: Spec,
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    negatives: Negatives | None = None,
    center: CenterTerm | None = None,
    extras: Extras | None = None,
) -> Dense:
    """Loss, gradients, moved centers and state of the whole batch against all classes, in float64."""
    negatives, center, extras = negatives or Negatives(), center or CenterTerm(), extras or Extras()
    base = base_of(spec)
    x = embeddings.double().clone().requires_grad_()
    w = weight.double().clone().requires_grad_()
    b = None if bias is None else bias.double().clone().requires_grad_()
    valid = labels >= 0
    y = labels[valid]
    n = max(1, int(valid.sum()))
    norms = x.norm(dim=1)
    cosines = F.normalize(x) @ F.normalize(w.flatten(0, -2)).T
    if w.dim() == 3:
        cosines = cosines.unflatten(1, w.shape[:2]).max(dim=2).values
    own = F.one_hot(labels.clamp(min=0), len(w)).bool()
    own_cosines = (cosines.detach() * own).sum(1)[valid]
    state = advance(base, extras.state, own_cosines, norms.detach()[valid])
    extras = Extras(state, extras.noise, extras.bias, extras.step)
    if base["name"] == "softmax":
        logits = x @ w.T + (0 if b is None else b)
        target = (logits * own).sum(1)
    else:
        target, logits = logits_of(base, cosines, own, norms, valid, extras)
    part = ~own if negatives.active is None else negatives.active & ~own
    if negatives.filter_threshold is not None:
        part = part & (cosines <= negatives.filter_threshold)
    present = torch.zeros(len(w), dtype=torch.bool)
    present[y] = True
    weights = part * torch.where(present, 1.0, negatives.hashed_only_weight)
    softmax_loss = sample_losses(spec, target[valid], logits[valid], weights[valid].double(), norms[valid]).sum() / n
    center_loss = torch.zeros((), dtype=torch.float64)
    moved = None
    if center.centers is not None:
        k = center.centers.double().clone()
        center_loss = 0.5 * center.weight * (x[valid] - k[y]).square().sum() / n
        moved = k.clone()
        for j in y.unique():
            mine = x.detach()[valid][y == j]
            moved[j] = k[j] - center.alpha * (k[j] - mine).sum(0) / (1 + len(mine))
    loss = softmax_loss + center_loss
    leaves = [x, w] + [leaf for leaf in (b, extras.bias) if leaf is not None]
    gradients = torch.autograd.grad(loss + 0 * sum(leaf.sum() for leaf in leaves), leaves)
    rest = list(gradients[2:])
    zero = torch.zeros((), dtype=torch.float64)
    return Dense(
        loss.detach(),
        softmax_loss.detach(),
        center_loss.detach(),
        own_cosines.mean() if len(own_cosines) else zero,
        gradients[0],
        gradients[1],
        rest.pop(0) if b is not None else None,
        moved,
        state,
        rest.pop(0) if extras.bias is not None else None,
    )


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max |value − reference| / max |reference|."""
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    error = float((value.double() - reference).abs().max()) if reference.numel() else 0.0
    return error / scale if scale > 1e-30 else error
