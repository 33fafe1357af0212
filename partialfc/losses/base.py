"""The interface between a loss and the sharded head.

For a sample with target class y the head forms ``log Σ_{j≠y} exp(z_j)`` over all shards and hands the loss
``d = log Σ_{j≠y} exp(z_j) − z_y``; softmax cross-entropy is then ``softplus(d)``. A loss defines how the target's
cosine and the negatives' cosines become logits; autograd takes its derivatives, in float64 for the targets.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from partialfc.errors import ConfigError

MarginGradient = Literal["exact", "straight_through"]

#: Everything that a loss may list in ``needs``.
NEEDS = frozenset({"norms", "target_cosine_first", "raw_logits", "noise", "mean_logit"})


@dataclass(frozen=True)
class Samples:
    """Data on the samples of the global batch, besides their cosines.

    All of it is detached, except ``norms`` if the loss ``needs`` them.
    """

    norms: Tensor  # [B] float64: lengths of the raw embeddings
    valid: Tensor  # [B] bool: false for an ignored sample (label -1)
    positions: Tensor  # [B] int64: the samples' positions in the global batch
    step: int  # the head's step
    seed: int
    target_cosine: Tensor | None = None  # [B] float64; in negative_logits and statistics only if "target_cosine_first"
    noise: Tensor | None = None  # [B] float64, if "noise": N(0, 1), a function of (seed, step, position)
    state: Tensor | None = None  # the loss's state as of this batch; None for a loss without one

    @property
    def counted(self) -> Tensor:
        """Deprecated name of ``valid``."""
        warnings.warn("samples.counted is now samples.valid", DeprecationWarning, stacklevel=2)
        return self.valid


class Loss(nn.Module):
    """Base of all losses: scaled cosines, softmax cross-entropy, no margin.

    Subclasses override :meth:`target_logit`, and other methods only where they differ from this.

    Args:
        scale: s, the inverse temperature; > 0.

    Buffer ``state``: None, or a float64 tensor that follows the batches (see :meth:`statistics`); equal on all ranks.
    """

    #: Inputs beyond cosines that the head must provide. "norms": gradients with respect to the embeddings' lengths.
    #: "target_cosine_first": the targets' cosines before any negative (one more collective). "raw_logits": inner
    #: products ``w·x + b`` in place of cosines. "noise": a normal number per sample. "mean_logit": see `objective`.
    needs: frozenset[str] = frozenset()

    #: K if each class has a weight [K, embedding_dim] and its cosine is the largest of K; None for a weight [D].
    sub_centers: int | None = None

    #: Gives each class a bias beside its weight (with "raw_logits").
    class_bias: bool = False

    #: If true, the negatives enter as ``log Σ exp(z_j)``; else each is a separate loss, ``Σ softplus(z_j)``.
    shared_denominator: bool = True

    state: Tensor | None

    def __init__(self, scale: float = 64.0) -> None:
        super().__init__()
        self.scale = check_positive("scale", scale)
        self.register_buffer("state", None)

    # --- logits -------------------------------------------------------------------------------------------------------

    def target_logit(self, cosine: Tensor, samples: Samples) -> Tensor:
        """Return the target class's logit z_y, [B] float64, from its ``cosine``, [B] float64; differentiable in it."""
        return self.scale * cosine

    def negative_logits(self, cosine: Tensor, samples: Samples) -> Tensor:
        """Return the other classes' logits z_j, [B, classes of a chunk], from their cosines; differentiable in them.

        The head uses the linearity of the default to save passes over each chunk; an override costs them.
        """
        return self.scale * cosine

    def logit_offset(self) -> Tensor | None:
        """Return a number to add to every negative's logit, [] or [1], differentiable in the loss's parameters."""
        return None

    def logit_bound(self) -> float:
        """Return the largest |z_j| of a negative; ``math.inf`` if there is no bound.

        Without a bound, or beyond 660, the ranks first agree on a maximum: one more collective.
        """
        return self.scale if self.negatives_are_linear and not self.raw_logits else math.inf

    # --- from logits to a loss ----------------------------------------------------------------------------------------

    def sample_loss(self, d: Tensor) -> Tensor:
        """Return the loss of each sample, [B] float64, from ``d = log Σ exp(z_j) − z_y``; differentiable in it."""
        return torch.logaddexp(d, torch.zeros_like(d))

    def objective(self, negatives: Tensor, target_logit: Tensor, mean_logit: Tensor | None) -> Tensor:
        """Return the loss of each sample, [B] float64; differentiable in all of its arguments.

        Args:
            negatives: [B] log Σ_{j≠y} exp(z_j); Σ_{j≠y} softplus(z_j) without a shared denominator.
            target_logit: [B] z_y.
            mean_logit: [B] mean logit of all classes that take part, the target's included; if "mean_logit".
        """
        return self.sample_loss(negatives - target_logit)

    def penalty(self, samples: Samples) -> Tensor | None:
        """Return a term of each sample's loss that ignores its logits, [B] float64; differentiable in the norms."""
        return None

    # --- state --------------------------------------------------------------------------------------------------------

    def statistics(self, samples: Samples) -> Tensor | None:
        """Return sums over the valid samples, [k] float64, from which :meth:`next_state` follows the batch."""
        return None

    def next_state(self, state: Tensor, statistics: Tensor) -> Tensor:
        """Return the state after a step over samples with these ``statistics`` (of all its micro-batches together).

        The logits of a training batch see the state that includes this batch; it is kept if the step is applied.
        """
        return state

    def reset(self, num_classes: int, sample_rate: float) -> None:
        """Set state and parameters to their initial values; called by the head that owns this loss."""

    @property
    def stateful(self) -> Loss:
        """The loss that holds the ``state``: this one, or the one that it wraps."""
        return self

    # --- derived properties -------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        state = self.state
        super()._apply(fn, recurse)
        if state is not None and self.state is not None:  # `head.bfloat16()` is not meant for a moving average
            self.state = self.state.double() if state.is_meta else state.to(self.state.device)
        return self

    def extra_repr(self) -> str:
        settings = {name: value for name, value in vars(self).items() if isinstance(value, float | int | str)}
        return ", ".join(f"{name}={value}" for name, value in settings.items() if name != "training" and name[0] != "_")

    @property
    def raw_logits(self) -> bool:
        """True if this loss works on inner products instead of cosines."""
        return "raw_logits" in self.needs

    @property
    def negatives_are_linear(self) -> bool:
        """True if :meth:`negative_logits` is ``scale·cosine``."""
        return type(self).negative_logits is Loss.negative_logits

    @property
    def is_cross_entropy(self) -> bool:
        """True if the loss of a sample is −log p_y of a softmax over its logits."""
        kind = type(self)
        return self.shared_denominator and kind.sample_loss is Loss.sample_loss and kind.objective is Loss.objective


class MarginLoss(Loss):
    """A loss with a margin on the target cosine: ``z_y = s·ψ(cos θ_y)``, ``z_j = s·cos θ_j``.

    Args:
        scale: s, the inverse temperature; > 0.
        margin_gradient: ``"exact"`` differentiates ψ. ``"straight_through"`` uses ψ' = 1, which reproduces training
            code that computes the margin under ``no_grad`` (InsightFace's arcface_torch).
    """

    def __init__(self, scale: float = 64.0, margin_gradient: MarginGradient = "exact") -> None:
        super().__init__(scale)
        if margin_gradient not in get_args(MarginGradient):
            raise ConfigError(f"margin_gradient must be one of {get_args(MarginGradient)}, got {margin_gradient!r}")
        self.margin_gradient = margin_gradient

    def with_margin(self, cosine: Tensor, samples: Samples) -> Tensor:
        """Return ψ(cos θ_y), [B] float64."""
        raise TypeError(f"{type(self).__name__} must define with_margin(cosine, samples)")

    def target_logit(self, cosine: Tensor, samples: Samples) -> Tensor:
        logit = self.scale * self.with_margin(cosine, samples)
        if self.margin_gradient == "straight_through":
            plain = self.scale * cosine
            return plain + (logit - plain).detach()
        return logit


class Wrapper(Loss):
    """A loss that changes one thing about another, ``base``, and otherwise behaves like it."""

    def __init__(self, base: Loss) -> None:
        if not isinstance(base, Loss):
            raise ConfigError(f"loss must be a partialfc.losses.Loss, e.g. losses.ArcFace(), got {base!r}")
        super().__init__(base.scale)
        self.needs, self.sub_centers = base.needs, base.sub_centers
        self.shared_denominator, self.class_bias = base.shared_denominator, base.class_bias
        self.base = base

    def extra_repr(self) -> str:
        """Return the wrapper's own settings; the others are shown with ``base``."""
        own = vars(self).keys() - {"scale", "shared_denominator", "class_bias", "training"}
        return ", ".join(f"{name}={vars(self)[name]}" for name in sorted(own) if name[0] != "_" and name != "needs")

    @property
    def stateful(self) -> Loss:
        return self.base.stateful

    def target_logit(self, cosine: Tensor, samples: Samples) -> Tensor:
        return self.base.target_logit(cosine, samples)

    def negative_logits(self, cosine: Tensor, samples: Samples) -> Tensor:
        return self.base.negative_logits(cosine, samples)

    def logit_offset(self) -> Tensor | None:
        return self.base.logit_offset()

    def logit_bound(self) -> float:
        unchanged = type(self).negative_logits is Wrapper.negative_logits
        return self.base.logit_bound() if unchanged else math.inf

    def sample_loss(self, d: Tensor) -> Tensor:
        return self.base.sample_loss(d)

    def objective(self, negatives: Tensor, target_logit: Tensor, mean_logit: Tensor | None) -> Tensor:
        return self.base.objective(negatives, target_logit, mean_logit)

    def penalty(self, samples: Samples) -> Tensor | None:
        return self.base.penalty(samples)

    def statistics(self, samples: Samples) -> Tensor | None:
        return self.base.statistics(samples)

    def next_state(self, state: Tensor, statistics: Tensor) -> Tensor:
        return self.base.next_state(state, statistics)

    def reset(self, num_classes: int, sample_rate: float) -> None:
        self.base.reset(num_classes, sample_rate)

    @property
    def negatives_are_linear(self) -> bool:
        return type(self).negative_logits is Wrapper.negative_logits and self.base.negatives_are_linear

    @property
    def is_cross_entropy(self) -> bool:
        unchanged = type(self).sample_loss is Wrapper.sample_loss and type(self).objective is Wrapper.objective
        return unchanged and self.base.is_cross_entropy


_SMALLEST_SINE = 1e-4


def angle(cosine: Tensor) -> Tensor:
    """Return θ = arccos(cosine) in [0, π], with dθ/dcos = −1/sin θ bounded by 1e4 at the ends.

    The bound sits where sin θ < 1e-4 (cosines within 5e-9 of ±1): below the resolution of float32 embeddings, and far
    from any angle where the derivative matters.
    """
    fixed = cosine.detach()
    value = torch.acos(fixed.clamp(-1.0, 1.0))
    grad = -1.0 / torch.sin(value).clamp_min(_SMALLEST_SINE)
    return value + grad * (cosine - fixed)  # the value is exact, the derivative is `grad`


def cos_of_sum(cosine: Tensor, margin: float | Tensor) -> Tensor:
    """Return cos(θ + m), monotone in the ``cosine`` of θ for every m in radians, one for all samples or one each.

    Where θ + m > π the cosine would rise again: there it is ``cos θ − m·sin m`` (Deng et al., ArcFace), for m beyond
    2.3 ``cos θ − (1 − cos m)``, as the former would be too high. Where θ + m < 0 (a negative m) it would fall again:
    there it stays 1.
    """
    cos_m: float | Tensor
    sin_m: float | Tensor
    drop: float | Tensor
    if isinstance(margin, Tensor):
        cos_m, sin_m = torch.cos(margin), torch.sin(margin)
        drop = torch.maximum(margin * sin_m, 1.0 - cos_m)
    else:  # plain numbers: reading a tensor would wait for a device
        cos_m, sin_m = math.cos(margin), math.sin(margin)
        drop = max(margin * sin_m, 1.0 - cos_m)
    shifted = torch.acos(cosine.detach().clamp(-1.0, 1.0)) + margin
    inside = (
        cosine * cos_m - _sine(cosine) * sin_m
    )  # the addition theorem: at m = 0 the derivative is 1 at the ends too
    return torch.where(shifted > math.pi, cosine - drop, torch.where(shifted < 0, torch.ones_like(cosine), inside))


def _sine(cosine: Tensor) -> Tensor:
    """Return sin θ ≥ 0, with a derivative bounded as in :func:`angle`."""
    fixed = cosine.detach().clamp(-1.0, 1.0)
    value = torch.sqrt((1.0 - fixed) * (1.0 + fixed))
    return value - fixed / value.clamp_min(_SMALLEST_SINE) * (cosine - cosine.detach())


def check_range(name: str, value: float, low: float, high: float) -> float:
    """Return ``value`` if it lies in [low, high], else raise ConfigError with the valid range."""
    if not _is_number(value) or not low <= value <= high:
        raise ConfigError(f"{name} must lie in [{low:g}, {high:g}], got {value}")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """Return ``value`` if it is a finite number > 0, else raise ConfigError."""
    if not (_is_number(value) and math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} must be a positive number, got {value}")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
