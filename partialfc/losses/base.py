"""What a loss is to the sharded head.

For a sample with target class y the head forms the negatives' log-sum-exp over all shards and hands the loss
``d = log Σ_{j≠y} exp(z_j) − z_y``; softmax cross-entropy is then ``softplus(d)``. A loss says how the target's cosine
and the negatives' cosines become logits; its derivatives are taken by autograd, in float64 for the targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from partialfc.errors import ConfigError

MarginGradient = Literal["exact", "straight_through"]


@dataclass(frozen=True)
class Samples:
    """What a loss may know of the samples whose logits it is asked for, besides their cosines."""

    norms: Tensor  # [n] float64: lengths of the raw embeddings
    positions: Tensor  # [n] int64: the samples' positions in the global batch
    step: int  # seeds, with `seed`, whatever a loss draws per sample
    seed: int


class Loss(nn.Module):
    """Base of all losses: scaled cosines, softmax cross-entropy, no margin.

    Subclasses override :meth:`target_logit`; :meth:`negative_logits` only if negatives are more than ``scale·cosine``.
    """

    #: What the head must provide beyond cosines; "raw_logits": inner products ``w·x + b`` in place of cosines.
    needs: frozenset[str] = frozenset()

    def __init__(self, scale: float = 64.0) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ConfigError(f"scale must be a positive number, got {scale}")
        self.scale = float(scale)

    def target_logit(self, cosine: Tensor, samples: Samples) -> Tensor:
        """The target class's logit z_y, [n] float64, from its ``cosine``, [n] float64; differentiable in it."""
        return self.scale * cosine

    def negative_logits(self, cosine: Tensor, samples: Samples) -> Tensor:
        """The other classes' logits z_j, [batch, classes of a chunk], from their cosines; differentiable in them.

        The default is known to be linear, which the head uses: an override costs one more pass over each chunk.
        """
        return self.scale * cosine

    def sample_loss(self, d: Tensor) -> Tensor:
        """The loss of each sample, [n] float64, from ``d = lse_negatives − z_y``; differentiable in it."""
        return torch.logaddexp(d, torch.zeros_like(d))

    def logit_bound(self) -> float:
        """The largest |z_j| a negative can have; ``math.inf`` if there is none."""
        return self.scale

    def extra_repr(self) -> str:
        settings = {name: value for name, value in vars(self).items() if isinstance(value, float | int | str)}
        return ", ".join(f"{name}={value}" for name, value in settings.items() if name != "training" and name[0] != "_")

    @property
    def raw_logits(self) -> bool:
        """Whether this loss works on inner products instead of cosines."""
        return "raw_logits" in self.needs

    @property
    def negatives_are_linear(self) -> bool:
        """Whether :meth:`negative_logits` is ``scale·cosine``."""
        return type(self).negative_logits is Loss.negative_logits


class MarginLoss(Loss):
    """A loss with a margin on the target cosine: ``z_y = s·ψ(cos θ_y)``, ``z_j = s·cos θ_j``.

    Args:
        scale: s, the inverse temperature; > 0.
        margin_gradient: ``"exact"`` differentiates ψ. ``"straight_through"`` takes ψ' = 1, which reproduces training
            code that computes the margin under ``no_grad`` (InsightFace's arcface_torch).
    """

    def __init__(self, scale: float = 64.0, margin_gradient: MarginGradient = "exact") -> None:
        super().__init__(scale)
        if margin_gradient not in get_args(MarginGradient):
            raise ConfigError(f"margin_gradient must be one of {get_args(MarginGradient)}, got {margin_gradient!r}")
        self.margin_gradient = margin_gradient

    def with_margin(self, cosine: Tensor, samples: Samples) -> Tensor:
        """ψ(cos θ_y), [n] float64."""
        raise TypeError(f"{type(self).__name__} must define with_margin(cosine, samples)")

    def target_logit(self, cosine: Tensor, samples: Samples) -> Tensor:
        logit = self.scale * self.with_margin(cosine, samples)
        if self.margin_gradient == "straight_through":
            plain = self.scale * cosine
            return plain + (logit - plain).detach()
        return logit


def angle(cosine: Tensor, smallest_sine: float = 1e-4) -> Tensor:
    """θ = arccos(cosine) in [0, π], with dθ/dcos = −1/sin θ bounded by ``1/smallest_sine`` at the ends.

    The bound sits where sin θ < 1e-4 (cosines within 5e-9 of ±1): below the resolution of float32 embeddings, and far
    from any angle where the derivative matters.
    """
    fixed = cosine.detach()
    value = torch.acos(fixed.clamp(-1.0, 1.0))
    slope = -1.0 / torch.sin(value).clamp_min(smallest_sine)
    return value + slope * (cosine - fixed)  # the value is exact, the derivative is `slope`


def check_range(name: str, value: float, low: float, high: float) -> float:
    """Return ``value`` if it lies in [low, high], else raise ConfigError with the valid range."""
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie in [{low:g}, {high:g}], got {value}")
    return float(value)
