"""The loss and its derivatives, from the combined statistics of the samples.

These are B numbers in float64: every rank computes all of them, and autograd differentiates them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.softmax.reduction import CombinedNegatives
from partialfc.losses import Loss, Samples


@dataclass(frozen=True)
class SampleGrads:
    """Derivatives of the mean loss by each sample's statistics, [B] float64; None where it does not depend on them."""

    negatives: Tensor  # by CombinedNegatives.value
    similarity: Tensor
    logit_sum: Tensor | None
    norms: Tensor | None
    parameters: tuple[Tensor | None, ...]  # by each parameter of the loss, of its shape


@dataclass(frozen=True)
class BatchLoss:
    """The loss of the global batch, [] float64 each, and its derivatives; equal on all ranks."""

    total: Tensor
    softmax_loss: Tensor
    center_loss: Tensor  # weight included
    target_cosine: Tensor  # mean over the valid samples
    grads: SampleGrads


def batch_loss(
    loss: Loss,
    samples: Samples,
    combined: CombinedNegatives,
    center_weight: float,
    similarity: Tensor,
    cosine: Tensor,
    center_distance: Tensor | None = None,
) -> BatchLoss:
    """Compute the loss of the global batch.

    Args:
        loss: the objective.
        samples: B samples.
        combined: their negatives.
        center_weight: λ of the center loss.
        similarity: [B] float64, w_y·x + b_y for a loss on raw logits, else the target cosine.
        cosine: [B] float64, the target cosine.
        center_distance: [B] float64 ‖x − k_y‖², with center loss.
    """
    mean = samples.valid.double() / samples.valid.sum().clamp_min(1)  # weights that take the mean of valid samples
    sample_losses, grads = _differentiate(loss, samples, combined, similarity, mean)
    softmax_loss = (sample_losses * mean).sum()
    center_loss = torch.zeros_like(softmax_loss)
    if center_distance is not None:
        center_loss = 0.5 * center_weight * (center_distance * mean).sum()
    total = softmax_loss + center_loss
    # A non-finite loss makes every gradient on every rank non-finite: all ranks then skip the step, or none.
    zero_or_nan = total - total
    grads = dataclasses.replace(
        grads, negatives=grads.negatives + zero_or_nan, similarity=grads.similarity + zero_or_nan
    )
    return BatchLoss(total, softmax_loss, center_loss, (cosine * mean).sum(), grads)


def _differentiate(
    loss: Loss, samples: Samples, combined: CombinedNegatives, similarity: Tensor, mean: Tensor
) -> tuple[Tensor, SampleGrads]:
    """Return each sample's loss, [B], 0 where it is ignored, and the derivatives of its mean over the batch."""

    def leaf(values: Tensor, if_ignored: float = 0.0) -> Tensor:
        return torch.where(samples.valid, values, if_ignored).requires_grad_()

    with torch.enable_grad():
        value, target, norms = leaf(combined.value), leaf(similarity), leaf(samples.norms, 1.0)
        samples = dataclasses.replace(samples, norms=norms if "norms" in loss.needs else norms.detach())
        target_logit = loss.target_logit(target, samples)
        offset, negatives = loss.logit_offset(), value
        if offset is not None:  # adds 0, and carries the offset's gradient
            negatives = value + combined.offset_grad * (offset - offset.detach())
        logit_sum = mean_logit = None
        if combined.logit_sum is not None and combined.count is not None:
            logit_sum = leaf(combined.logit_sum)
            carried = 0.0 if offset is None else combined.count * (offset - offset.detach())
            mean_logit = (target_logit + logit_sum + carried) / (1.0 + combined.count)
        sample_losses = loss.objective(negatives, target_logit, mean_logit)
        penalty = loss.penalty(samples)
        if penalty is not None:
            sample_losses = sample_losses + penalty
        sample_losses = torch.where(samples.valid, sample_losses, 0.0)
        parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        variables = [value, target, norms, *([] if logit_sum is None else [logit_sum]), *parameters]
        grads = torch.autograd.grad((sample_losses * mean).sum(), variables, allow_unused=True)
    by_value, by_target, by_norms, *rest = grads
    by_logit_sum = None if logit_sum is None else rest.pop(0)
    by_parameter = iter(rest)
    return sample_losses.detach(), SampleGrads(
        torch.zeros_like(value) if by_value is None else by_value,
        torch.zeros_like(value) if by_target is None else by_target,
        by_logit_sum,
        by_norms,
        tuple(next(by_parameter) if parameter.requires_grad else None for parameter in loss.parameters()),
    )
