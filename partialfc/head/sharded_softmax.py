"""Softmax cross-entropy over classes that are sharded by rank and walked in chunks.

With z the logits, lse the log-sum-exp of the negatives of all shards and ``d = lse − z_y``, the loss of a sample is
``softplus(d)`` and its derivatives are ``∂/∂lse = σ(d)``, ``∂/∂z_y = −σ(d)``, ``∂/∂z_j = σ(d)·exp(z_j − lse)``. Neither
``lse − z_y`` of a sum that holds the target nor ``p_y − 1`` is ever formed: both cancel in float32 once training works.

The forward pass also sums ``Σ_j exp(z_j)·w_j``, which is the embeddings' gradient up to factors that are known once the
shards' statistics are combined. So backward can send that gradient off at once and compute the rows' gradient while it
travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partialfc.head.center_loss import CenterLoss
from partialfc.head.class_chunks import NORM_EPS, ActiveRows, ClassChunks
from partialfc.head.collectives import Collectives
from partialfc.losses import Loss, Samples

# Largest exponent whose exponentials, their sums over 1e9 rows and the reciprocals of these stay normal numbers.
_SAFE_EXPONENT = {torch.float32: 66.0, torch.float64: 680.0}
# Largest logit for which shards may exchange plain sums of exponentials in float64.
_SAFE_TO_SUM = 680.0


@dataclass
class Statistics:
    """What the forward pass found, equal on all ranks; detached."""

    softmax_loss: Tensor  # []
    center_loss: Tensor  # [], weight included
    target_cosine: Tensor  # [], mean over the samples that count
    num_samples: Tensor  # [] int64


@dataclass
class ShardStep:
    """One step as one shard sees it."""

    loss: Loss
    collectives: Collectives
    embeddings: Tensor  # [B, D] the global batch, raw, in compute dtype
    labels: Tensor  # [B] int64, -1 = does not count
    local_count: int  # samples of this rank
    first_class: int  # of this shard
    active: ActiveRows
    step: int
    seed: int
    filter_threshold: float | None
    memory_budget: int  # bytes
    center_loss: CenterLoss | None
    wants_grad: bool
    training: bool
    statistics: Statistics | None = None


@dataclass
class _Targets:
    """The samples whose class this shard owns, in float64: one D-vector a sample buys exact margins."""

    samples: Tensor  # [n] positions in the global batch
    rows: Tensor  # [n] rows of the shard
    embeddings: Tensor  # [n, D] unit length, or raw
    directions: Tensor  # [n, D] unit length, or the weights
    embedding_norms: Tensor  # [n]
    weight_norms: Tensor  # [n]
    cosines: Tensor  # [n]
    logits: Tensor  # [n]
    slopes: Tensor  # [n] dz_y/dcos, or dz_y/d(w·x)


class ShardedSoftmax(torch.autograd.Function):
    """``apply(local_embeddings, weight, bias, step) -> loss``; see the module's text.

    Gradients: ``world_size · ∂loss/∂local_embeddings`` (so that averaging over ranks gives the backbone's exact
    gradient), and sparse rows for ``weight`` and ``bias``, unscaled.
    """

    @staticmethod
    def forward(ctx: Any, local_embeddings: Tensor, weight: Tensor, bias: Tensor | None, step: ShardStep) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return _forward(ctx, local_embeddings, weight, bias, step)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        with torch.autocast(grad_loss.device.type, enabled=False):
            return _backward(ctx, grad_loss)


def _forward(ctx: Any, local_embeddings: Tensor, weight: Tensor, bias: Tensor | None, step: ShardStep) -> Tensor:
    loss, x, labels = step.loss, step.embeddings, step.labels
    raw = loss.raw_logits
    norms = torch.linalg.vector_norm(x, dim=1).clamp_min_(NORM_EPS)  # [B]
    unit = x if raw else x / norms[:, None]
    samples = Samples(norms.double(), torch.arange(len(x), device=x.device), step.step, step.seed)

    targets = _find_targets(step, norms, weight, bias, samples, raw)
    target_rows = torch.full_like(labels, -1)
    target_rows[targets.samples] = _positions(step.active, targets.rows)
    chunks = ClassChunks(
        loss, samples, unit, weight, bias, step.active, target_rows, step.filter_threshold, step.memory_budget
    )
    sums, shift, pull, kept = _sum_negatives(chunks, step.wants_grad, keep=ctx.needs_input_grad[1])

    offsets = None
    if step.center_loss is not None:
        offsets = x[targets.samples] - step.center_loss.centers[targets.rows].to(x.dtype)  # x − k, [n, D]
    message = _message(len(x), targets, offsets, raw)
    lse = _combine(step, message, sums, shift, chunks.logit_bound())
    total, slope, mean = _finish_loss(step, message, lse)
    if not step.wants_grad:
        return total.to(x.dtype)

    # A loss that is not finite makes every gradient of every rank so: all of them then skip the step, or none.
    share = slope * mean + (total - total)  # [B] ∂loss/∂lse
    # exp(z − shift)·exp(shift − lse)·share = ∂loss/∂z of a negative.
    ratio = torch.where(torch.isneginf(lse), 0.0, torch.exp(shift - lse))
    pull.mul_(ratio[:, None]).mul_((share * (loss.scale if chunks.linear else 1.0))[:, None])
    ctx.grad_embeddings = _embedding_gradient(step, pull, unit, norms, targets, share, offsets, mean, raw)
    target_gradient = _target_row_gradient(targets, share, raw).to(x.dtype)
    ctx.step, ctx.chunks, ctx.offsets, ctx.has_bias = step, chunks, offsets, bias is not None
    ctx.local_dtype = local_embeddings.dtype
    ctx.save_for_backward(
        weight, lse, shift, share, targets.rows, target_rows[targets.samples], targets.samples, target_gradient, *kept
    )
    return total.to(x.dtype)


def _find_targets(
    step: ShardStep, norms: Tensor, weight: Tensor, bias: Tensor | None, samples: Samples, raw: bool
) -> _Targets:
    rows = step.labels - step.first_class
    owned = ((rows >= 0) & (rows < len(weight)) & (step.labels >= 0)).nonzero().flatten()
    rows = rows[owned]
    x, w = step.embeddings[owned].double(), weight[rows].double()
    x_norms = torch.linalg.vector_norm(x, dim=1).clamp_min(NORM_EPS)
    w_norms = torch.linalg.vector_norm(w, dim=1).clamp_min(NORM_EPS)
    if not raw:
        x, w = x / x_norms[:, None], w / w_norms[:, None]
    cosines = (x * w).sum(dim=1)
    own = Samples(samples.norms[owned], samples.positions[owned], samples.step, samples.seed)
    with torch.enable_grad():
        variable = cosines.detach().requires_grad_()
        shifted = variable if bias is None else variable + bias.detach()[rows].double()
        logits = step.loss.target_logit(shifted, own)
        (slopes,) = torch.autograd.grad(logits.sum(), variable)
    return _Targets(owned, rows, x, w, x_norms, w_norms, cosines, logits.detach(), slopes)


def _message(batch: int, targets: _Targets, offsets: Tensor | None, raw: bool) -> Tensor:
    """Everything that is known per sample on one shard only, in one tensor to sum over ranks, [B, k] float64.

    Columns: the negatives' sum (filled in later), z_y, cos_y, and with center loss ‖x − k‖².
    """
    message = targets.cosines.new_zeros(batch, 3 if offsets is None else 4)
    message[targets.samples, 1] = targets.logits
    cosines = targets.cosines / (targets.embedding_norms * targets.weight_norms) if raw else targets.cosines
    message[targets.samples, 2] = cosines
    if offsets is not None:
        message[targets.samples, 3] = offsets.double().square().sum(dim=1)
    return message


def _finish_loss(step: ShardStep, message: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The total loss, ∂(sample's loss)/∂lse [B], and each sample's weight in the mean [B], all float64."""
    valid = step.labels >= 0
    count = valid.sum()
    mean = valid.double() / count.clamp_min(1)
    with torch.enable_grad():
        d = torch.where(valid, lse - message[:, 1], torch.zeros_like(lse)).requires_grad_()
        sample_loss = step.loss.sample_loss(d)
        (slope,) = torch.autograd.grad(sample_loss.sum(), d)
    softmax_loss = (sample_loss.detach() * mean).sum()
    center_loss = torch.zeros_like(softmax_loss)
    if step.center_loss is not None:
        center_loss = 0.5 * step.center_loss.weight * (message[:, 3] * mean).sum()
    target_cosine = (message[:, 2] * mean).sum()
    dtype = step.embeddings.dtype
    step.statistics = Statistics(softmax_loss.to(dtype), center_loss.to(dtype), target_cosine.to(dtype), count)
    return softmax_loss + center_loss, slope, mean


def _positions(active: ActiveRows, rows: Tensor) -> Tensor:
    """Where ``rows`` of the shard lie among its active rows."""
    return rows if active.rows is None else torch.searchsorted(active.rows, rows)


def _sum_negatives(chunks: ClassChunks, wants_grad: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Sums over this shard's active negatives j of each sample: Σ exp(z_j − shift), [B] float64; the shift, [B]
    float64; ``pull`` = Σ exp(z_j − shift)·(dz_j/dcos_j)·w_j, [B, D], where the slope of linear logits is left to the
    caller; and the exponentials of the first chunks, as many as the memory budget holds.
    """
    x = chunks.embeddings
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    pull = torch.zeros_like(x)
    kept: list[Tensor] = []
    if chunks.logit_bound() <= _SAFE_EXPONENT[x.dtype]:
        for chunk in chunks:
            keep_this = keep and wants_grad and chunks.linear and chunk.index < chunks.chunks_to_keep
            logits, slopes = chunks.logits(chunk, keep_this)
            exponentials = logits.exp_()
            sums += exponentials.sum(dim=1)
            if wants_grad:
                pull.addmm_(exponentials if slopes is None else exponentials * slopes, chunk.directions)
                if keep_this:
                    kept.append(exponentials)
        return sums, torch.zeros_like(sums), pull, kept
    running = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)  # maximum so far
    for chunk in chunks:
        logits, slopes = chunks.logits(chunk)
        maximum = torch.maximum(running, logits.amax(dim=1))
        reference = maximum.masked_fill(torch.isneginf(maximum), 0.0)
        rescale = torch.exp(running - reference)
        exponentials = logits.sub_(reference[:, None]).exp_()
        sums.mul_(rescale).add_(exponentials.sum(dim=1))
        if wants_grad:
            pull.mul_(rescale[:, None])
            pull.addmm_(exponentials if slopes is None else exponentials * slopes, chunk.directions)
        running = maximum
    return sums, running.masked_fill_(torch.isneginf(running), 0.0).double(), pull, kept


def _combine(step: ShardStep, message: Tensor, sums: Tensor, shift: Tensor, logit_bound: float) -> Tensor:
    """Reduce ``message`` over ranks, with the shards' sums in column 0; return the negatives' log-sum-exp, [B]."""
    common = torch.zeros_like(shift)
    if not logit_bound <= _SAFE_TO_SUM:
        # exp of these logits may not fit float64: agree on a maximum first.
        common = step.collectives.maximum(torch.where(sums > 0, shift, -torch.inf))
        common = common.masked_fill(torch.isneginf(common), 0.0)
    message[:, 0] = sums * torch.exp(shift - common)
    step.collectives.sum(message)
    return torch.log(message[:, 0]) + common


def _embedding_gradient(
    step: ShardStep,
    pull: Tensor,
    unit: Tensor,
    norms: Tensor,
    targets: _Targets,
    share: Tensor,
    offsets: Tensor | None,
    mean: Tensor,
    raw: bool,
) -> Tensor:
    """This shard's part of ∂loss/∂(raw embeddings), [B, D]; overwrites ``pull``, its part from the negatives."""
    push = -share[targets.samples] * targets.slopes  # [n] ∂loss/∂cos_y
    if raw:
        target_part = targets.directions * push[:, None]
    else:
        # Through the normalisation; the target's part in float64, since w_y − cos·x cancels in a trained state.
        pull.addcmul_(unit, (unit * pull).sum(dim=1, keepdim=True), value=-1).div_(norms[:, None])
        tangent = targets.directions - targets.cosines[:, None] * targets.embeddings
        target_part = tangent * (push / targets.embedding_norms)[:, None]
    if offsets is not None and step.center_loss is not None:
        target_part = target_part + offsets * (step.center_loss.weight * mean[targets.samples])[:, None]
    return pull.index_add_(0, targets.samples, target_part.to(pull.dtype))


def _target_row_gradient(targets: _Targets, share: Tensor, raw: bool) -> Tensor:
    """∂loss/∂(weight of each owned sample's class) through its target logit, [n, D] float64."""
    push = -share[targets.samples] * targets.slopes  # [n] ∂loss/∂cos_y
    if raw:
        return targets.embeddings * push[:, None]
    tangent = targets.embeddings - targets.cosines[:, None] * targets.directions
    return tangent * (push / targets.weight_norms)[:, None]


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    step: ShardStep = ctx.step
    weight, lse, shift, share, target_shard_rows, target_rows, target_samples, target_gradient, *kept = (
        ctx.saved_tensors
    )
    world_size = step.collectives.world_size
    arrived = step.collectives.start_reduce_scatter(ctx.grad_embeddings * (grad_loss * world_size))

    grad_weight = grad_bias = None
    if ctx.needs_input_grad[1]:
        values, bias_values = _row_gradient(ctx, weight, lse, shift, share * grad_loss, kept)
        values.index_add_(0, target_rows, target_gradient * grad_loss.to(target_gradient.dtype))
        rows = step.active.rows
        if rows is None:
            rows = torch.arange(len(weight), device=weight.device)
        grad_weight = _sparse(rows, values, weight.shape)
        if bias_values is not None:
            bias_values.index_add_(0, target_rows, (-share[target_samples] * grad_loss).to(bias_values.dtype))
            grad_bias = _sparse(rows, bias_values, weight.shape[:1])
    if step.training and step.center_loss is not None and ctx.offsets is not None:
        step.center_loss.accumulate(target_shard_rows, ctx.offsets)
        ctx.offsets = None  # a second backward through a retained graph sees the same samples
    return arrived()[: step.local_count].to(ctx.local_dtype), grad_weight, grad_bias, None


def _row_gradient(
    ctx: Any, weight: Tensor, lse: Tensor, shift: Tensor, share: Tensor, kept: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """∂loss/∂(active rows) from the negatives, [A, D], and of their biases, [A]; ``share`` is ∂loss/∂lse, [B]."""
    chunks: ClassChunks = ctx.chunks
    dtype = chunks.embeddings.dtype
    values = chunks.embeddings.new_empty(chunks.active.count, weight.shape[1])
    bias_values = chunks.embeddings.new_empty(chunks.active.count) if ctx.has_bias else None
    exists = ~torch.isneginf(lse)
    reference = lse.masked_fill(~exists, 0.0).to(dtype)[:, None]
    kept_ratio = torch.where(exists, torch.exp(shift - lse), 0.0).to(dtype)[:, None]
    weighted = (chunks.scaled if chunks.linear else chunks.embeddings) * share.to(dtype)[:, None]  # [B, D]
    for chunk in chunks:
        if chunk.index < len(kept):
            probabilities = torch.mul(kept[chunk.index], kept_ratio, out=chunks.logits_buffer(chunk))
        else:
            logits, slopes = chunks.logits(chunk)
            probabilities = logits.sub_(reference).exp_()  # of a negative among the negatives
            if slopes is not None:
                probabilities = probabilities * slopes
        gradient = torch.mm(probabilities.t(), weighted, out=values[chunk.start : chunk.stop])
        if chunk.inverse_norms is not None:  # through the normalisation of the rows
            along = torch.linalg.vecdot(chunk.directions, gradient)
            gradient.addcmul_(chunk.directions, along[:, None], value=-1).mul_(chunk.inverse_norms[:, None])
        if bias_values is not None:
            torch.mv(probabilities.t(), share.to(dtype), out=bias_values[chunk.start : chunk.stop])
    return values, bias_values


def _sparse(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=True, check_invariants=False)
