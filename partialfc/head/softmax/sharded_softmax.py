"""Softmax cross-entropy over classes that are sharded by rank and walked in chunks.

With z the logits, lse the log-sum-exp of the negatives of all shards and ``d = lse − z_y``, the loss of a sample is
``softplus(d)`` and its derivatives are ``∂/∂lse = σ(d)``, ``∂/∂z_y = −σ(d)``, ``∂/∂z_j = σ(d)·exp(z_j − lse)``. Neither
``lse − z_y`` of a sum that holds the target nor ``p_y − 1`` is ever formed: both cancel in float32 once training works.

What the loss makes of lse and of the target's cosine is a matter of B numbers a rank, in float64, once the shards'
statistics are combined: every rank does all of it, and autograd differentiates it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partialfc.head.center_loss import CenterLoss
from partialfc.head.collectives import Collectives
from partialfc.head.random import normal_rows, stream_key
from partialfc.head.softmax.class_chunks import NORM_EPS, ClassChunks
from partialfc.head.softmax.negatives import Combined, LogSumExp, SoftplusSum
from partialfc.head.softmax.sampling import ActiveRows
from partialfc.head.softmax.targets import Targets, find_targets
from partialfc.losses import Loss, Samples

_NOISE = 3  # the purpose that tells this stream of random numbers from the others


@dataclass
class Statistics:
    """What the forward pass found, equal on all ranks; detached."""

    softmax_loss: Tensor  # []
    center_loss: Tensor  # [], weight included
    target_cosine: Tensor  # [], mean over the samples that count
    num_samples: Tensor  # [] int64
    of_loss: Tensor | None  # [k] float64: what the loss's state is to learn of this batch


@dataclass
class ShardStep:
    """One step as one shard sees it."""

    loss: Loss
    collectives: Collectives
    embeddings: Tensor  # [B, D] the global batch, raw, in compute dtype
    labels: Tensor  # [B] int64, -1 = does not count
    positions: Tensor  # [B] int64 of the samples in the step's global batch
    local_count: int  # samples of this rank
    first_class: int  # of this shard
    active: ActiveRows
    step: int
    seed: int
    filter_threshold: float | None
    memory_budget: int  # bytes
    center_loss: CenterLoss | None
    earlier_statistics: Tensor | None  # of the loss, from earlier micro-batches of this step
    wants_grad: bool
    training: bool
    statistics: Statistics | None = None


@dataclass
class _Slopes:
    """Derivatives of the mean loss by each sample's statistics, [B] float64; None where it does not depend on them."""

    negatives: Tensor
    similarity: Tensor
    logit_sum: Tensor | None
    norms: Tensor | None
    parameters: list[Tensor | None]  # of the loss


class ShardedSoftmax(torch.autograd.Function):
    """``apply(local_embeddings, weight, bias, step, *loss_parameters) -> loss``; see the module's text.

    Gradients: ``world_size · ∂loss/∂local_embeddings`` (so that averaging over ranks gives the backbone's exact
    gradient), sparse rows for ``weight`` and ``bias``, unscaled, and the same full gradient of the loss's parameters
    on every rank.
    """

    @staticmethod
    def forward(
        ctx: Any, local_embeddings: Tensor, weight: Tensor, bias: Tensor | None, step: ShardStep, *parameters: Tensor
    ) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return _forward(ctx, local_embeddings, weight, bias, step)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_loss.device.type, enabled=False):
            return _backward(ctx, grad_loss)


def _forward(ctx: Any, local_embeddings: Tensor, weight: Tensor, bias: Tensor | None, step: ShardStep) -> Tensor:
    loss, x, labels = step.loss, step.embeddings, step.labels
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).clamp_min_(NORM_EPS)  # [B]
    unit = x if loss.raw_logits else x / norms.to(x.dtype)[:, None]

    targets = find_targets(x, labels, weight, bias, step.first_class, loss.raw_logits)
    samples = _describe_samples(step, norms, targets)
    target_rows = torch.full_like(labels, -1)
    target_rows[targets.samples] = _positions(step.active, targets.rows)
    chunks = ClassChunks(
        loss, samples, unit, weight, bias, step.active, target_rows, step.filter_threshold, step.memory_budget
    )
    negatives = LogSumExp(chunks, "mean_logit" in loss.needs) if loss.shared_denominator else SoftplusSum(chunks)
    negatives.sum_shard(step.wants_grad, keep=ctx.needs_input_grad[1])

    offsets = None
    if step.center_loss is not None:
        offsets = x[targets.samples] - step.center_loss.centers[targets.rows].to(x.dtype)  # x − k, [n, D]
    message = torch.cat((negatives.columns(step.collectives), _columns(len(x), targets, offsets)), dim=1)
    step.collectives.sum(message)
    split = message.shape[1] - (2 if offsets is None else 3)
    combined = negatives.combine(message[:, :split])
    total, slopes = _finish_loss(step, samples, combined, *message[:, split:].unbind(1))
    if not step.wants_grad:
        return total.to(x.dtype)

    pull = negatives.embedding_pull(slopes.negatives, slopes.logit_sum)
    ctx.grad_embeddings = _embedding_gradient(step, pull, unit, norms, targets, slopes, offsets)
    owned_slope = slopes.similarity[targets.samples]
    target_gradient = targets.row_gradient(owned_slope).to(x.dtype)
    ctx.step, ctx.negatives, ctx.offsets, ctx.has_bias = step, negatives, offsets, bias is not None
    ctx.local_dtype, ctx.parameter_slopes = local_embeddings.dtype, slopes.parameters
    kept, negatives.kept = negatives.kept, []
    nearest = torch.zeros_like(targets.rows) if targets.nearest is None else targets.nearest
    ctx.save_for_backward(
        weight, targets.rows, target_rows[targets.samples], nearest, owned_slope, target_gradient, *kept
    )
    return total.to(x.dtype)


def _describe_samples(step: ShardStep, norms: Tensor, targets: Targets) -> Samples:
    """What the loss may know of the batch; where it needs the targets' cosines first, one collective."""
    loss = step.loss
    samples = Samples(norms, step.labels >= 0, step.positions, step.step, step.seed)
    if "noise" in loss.needs:
        noise = torch.empty(len(norms), 1, dtype=torch.float32, device=norms.device)
        normal_rows(stream_key(step.seed, _NOISE, step.step), step.positions, 1, 1.0, noise)
        samples = dataclasses.replace(samples, noise=noise[:, 0].double())
    if "target_cosine_first" in loss.needs:
        cosines = torch.zeros_like(norms)
        cosines[targets.samples] = targets.cosines
        samples = dataclasses.replace(samples, target_cosine=step.collectives.sum(cosines))
    state = loss.stateful.state
    if state is not None and step.training:
        state = loss.next_state(state, _statistics_so_far(step, samples))
    return dataclasses.replace(samples, state=state)


def _statistics_so_far(step: ShardStep, samples: Samples) -> Tensor:
    """The loss's statistics of the step's micro-batches, this one included."""
    found = step.loss.statistics(samples)
    assert found is not None, "a loss with a state must define statistics()"
    return found if step.earlier_statistics is None else found + step.earlier_statistics


def _columns(batch: int, targets: Targets, offsets: Tensor | None) -> Tensor:
    """What is known of each sample on one shard only, to be summed over ranks, [B, k] float64.

    Columns: what the loss sees of the target, its cosine, and with center loss ‖x − k‖².
    """
    columns = targets.cosines.new_zeros(batch, 2 if offsets is None else 3)
    columns[targets.samples, 0] = targets.similarity
    columns[targets.samples, 1] = targets.cosines
    if offsets is not None:
        columns[targets.samples, 2] = offsets.double().square().sum(dim=1)
    return columns


def _finish_loss(
    step: ShardStep,
    samples: Samples,
    combined: Combined,
    similarity: Tensor,
    cosine: Tensor,
    center_distance: Tensor | None = None,
) -> tuple[Tensor, _Slopes]:
    """The total loss, [], and its derivatives, all float64; the same on every rank."""
    counted = samples.counted
    count = counted.sum()
    mean = counted.double() / count.clamp_min(1)
    sample_losses, slopes = _differentiate(step.loss, samples, combined, similarity, mean)
    softmax_loss = (sample_losses * mean).sum()
    center_loss = torch.zeros_like(softmax_loss)
    if step.center_loss is not None and center_distance is not None:
        center_loss = 0.5 * step.center_loss.weight * (center_distance * mean).sum()
    total = softmax_loss + center_loss
    # A loss that is not finite makes every gradient of every rank so: all of them then skip the step, or none.
    slopes.negatives.add_(total - total)
    slopes.similarity.add_(total - total)
    dtype = step.embeddings.dtype
    step.statistics = Statistics(
        softmax_loss.to(dtype),
        center_loss.to(dtype),
        (cosine * mean).sum().to(dtype),
        count,
        step.loss.statistics(samples),
    )
    return total, slopes


def _differentiate(
    loss: Loss, samples: Samples, combined: Combined, similarity: Tensor, mean: Tensor
) -> tuple[Tensor, _Slopes]:
    """Each sample's loss, [B], 0 where it does not count, and the derivatives of its mean over the batch."""

    def leaf(values: Tensor, elsewhere: float = 0.0) -> Tensor:
        return torch.where(samples.counted, values, elsewhere).requires_grad_()

    with torch.enable_grad():
        value, target, norms = leaf(combined.value), leaf(similarity), leaf(samples.norms, 1.0)
        samples = dataclasses.replace(samples, norms=norms if "norms" in loss.needs else norms.detach())
        target_logit = loss.target_logit(target, samples)
        offset, negatives = loss.logit_offset(), value
        if offset is not None:  # a number of value 0 that carries the offset's gradient
            negatives = value + combined.offset_slope * (offset - offset.detach())
        logit_sum = mean_logit = None
        if combined.logit_sum is not None and combined.count is not None:
            logit_sum = leaf(combined.logit_sum)
            carried = 0.0 if offset is None else combined.count * (offset - offset.detach())
            mean_logit = (target_logit + logit_sum + carried) / (1.0 + combined.count)
        sample_losses = loss.objective(negatives, target_logit, mean_logit)
        penalty = loss.penalty(samples)
        if penalty is not None:
            sample_losses = sample_losses + penalty
        sample_losses = torch.where(samples.counted, sample_losses, 0.0)
        parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        variables = [value, target, norms, *([] if logit_sum is None else [logit_sum]), *parameters]
        found = torch.autograd.grad((sample_losses * mean).sum(), variables, allow_unused=True)
    by_value, by_target, by_norms, *rest = found
    by_logit_sum = None if logit_sum is None else rest.pop(0)
    by_parameter = iter(rest)
    slopes = _Slopes(
        torch.zeros_like(value) if by_value is None else by_value,
        torch.zeros_like(value) if by_target is None else by_target,
        by_logit_sum,
        by_norms,
        [next(by_parameter) if parameter.requires_grad else None for parameter in loss.parameters()],
    )
    return sample_losses.detach(), slopes


def _positions(active: ActiveRows, rows: Tensor) -> Tensor:
    """Where ``rows`` of the shard lie among its active rows."""
    return rows if active.rows is None else torch.searchsorted(active.rows, rows)


def _embedding_gradient(
    step: ShardStep,
    pull: Tensor,
    unit: Tensor,
    norms: Tensor,
    targets: Targets,
    slopes: _Slopes,
    offsets: Tensor | None,
) -> Tensor:
    """This shard's part of ∂loss/∂(raw embeddings), [B, D]; overwrites ``pull``, its part from the negatives."""
    if not step.loss.raw_logits:  # through the normalisation
        along = (unit * pull).sum(dim=1, keepdim=True)
        pull.addcmul_(unit, along, value=-1).div_(norms.to(pull.dtype)[:, None])
    own = targets.samples
    norm_slope = None if slopes.norms is None else slopes.norms[own]
    target_part = targets.embedding_gradient(slopes.similarity[own], norm_slope)
    if offsets is not None and step.center_loss is not None:
        count = (step.labels >= 0).sum().clamp_min(1).double()
        target_part = target_part + offsets * (step.center_loss.weight / count)
    return pull.index_add_(0, own, target_part.to(pull.dtype))


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    step: ShardStep = ctx.step
    weight, target_shard_rows, target_rows, nearest, owned_slope, target_gradient, *kept = ctx.saved_tensors
    world_size = step.collectives.world_size
    arrived = step.collectives.start_reduce_scatter(ctx.grad_embeddings * (grad_loss * world_size))

    grad_weight = grad_bias = None
    if ctx.needs_input_grad[1]:
        values, bias_values = _row_gradient(ctx, weight, grad_loss, kept)
        sub_centers = weight.shape[1] if weight.dim() == 3 else 1
        values.view(-1, weight.shape[-1]).index_add_(
            0, target_rows * sub_centers + nearest, target_gradient * grad_loss.to(target_gradient.dtype)
        )
        rows = step.active.rows
        if rows is None:
            rows = torch.arange(len(weight), device=weight.device)
        grad_weight = _sparse(rows, values, weight.shape)
        if bias_values is not None:
            bias_values.index_add_(0, target_rows, (owned_slope * grad_loss).to(bias_values.dtype))
            grad_bias = _sparse(rows, bias_values, weight.shape[:1])
    if step.training and step.center_loss is not None and ctx.offsets is not None:
        step.center_loss.accumulate(target_shard_rows, ctx.offsets)
        ctx.offsets = None  # a second backward through a retained graph sees the same samples
    grad_embeddings = arrived()[: step.local_count].to(ctx.local_dtype)
    grad_parameters = [None if slope is None else slope * grad_loss for slope in ctx.parameter_slopes]
    return grad_embeddings, grad_weight, grad_bias, None, *grad_parameters


def _row_gradient(ctx: Any, weight: Tensor, grad_loss: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """∂loss/∂(active rows) from the negatives, [A, D] or [A, K, D], and of their biases, [A]."""
    negatives: LogSumExp | SoftplusSum = ctx.negatives
    chunks = negatives.chunks
    values = chunks.embeddings.new_empty(chunks.active.count, *weight.shape[1:])
    bias_values = chunks.embeddings.new_empty(chunks.active.count) if ctx.has_bias else None
    factors = negatives.start_backward(grad_loss)  # [B]
    vectors = chunks.scaled * factors[:, None]  # [B, D]
    for chunk in chunks:
        coefficients, logits = negatives.coefficients(chunk, kept)
        by_cosine = coefficients if logits.slopes is None else coefficients * logits.slopes
        chunks.push(chunk, by_cosine, logits.nearest, vectors, out=values[chunk.start : chunk.stop])
        if bias_values is not None:
            torch.mv(coefficients.t(), factors, out=bias_values[chunk.start : chunk.stop])
    return values, bias_values


def _sparse(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=True, check_invariants=False)
