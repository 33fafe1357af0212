"""Softmax cross-entropy over classes that are sharded by rank and walked in chunks.

With z the logits, lse the log-sum-exp of the negatives of all shards and ``d = lse − z_y``, the loss of a sample is
``softplus(d)`` and its derivatives are ``∂/∂lse = σ(d)``, ``∂/∂z_y = −σ(d)``, ``∂/∂z_j = σ(d)·exp(z_j − lse)``. Neither
``lse − z_y`` of a sum that holds the target nor ``p_y − 1`` is ever formed: both cancel in float32 once training works.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partialfc.errors import DoubleBackward
from partialfc.head.center_loss import CenterLoss
from partialfc.head.collectives import Collectives
from partialfc.head.gather import LocalBatch
from partialfc.head.optim.sparse_grads import mark_sorted
from partialfc.head.ownership import OwnedSamples
from partialfc.head.random import RandomStream, normal_rows, stream_key
from partialfc.head.softmax.class_chunks import NORM_EPS, ClassChunks
from partialfc.head.softmax.float32 import full_float32
from partialfc.head.softmax.log_sum_exp import log_sum_exp
from partialfc.head.softmax.products import Products
from partialfc.head.softmax.reduction import CombinedNegatives, NegativesForward
from partialfc.head.softmax.sample_losses import SampleGrads, batch_loss
from partialfc.head.softmax.sampling import ActiveRows
from partialfc.head.softmax.softplus_sum import softplus_sum
from partialfc.head.softmax.targets import Targets, find_targets
from partialfc.losses import Loss, Samples


@dataclass(frozen=True)
class ShardStep:
    """Inputs of a step on one shard."""

    local: LocalBatch  # this rank's part of the batch
    embeddings: Tensor  # [B, D] the global batch, raw, in the compute dtype
    labels: Tensor  # [B] int64, -1 = ignored
    positions: Tensor  # [B] int64 of the samples in the step's global batch
    owned: OwnedSamples
    active: ActiveRows
    products: Products
    loss: Loss
    center_loss: CenterLoss | None
    earlier_statistics: Tensor | None  # of the loss, from earlier micro-batches of this step
    collectives: Collectives
    seed: int
    filter_threshold: float | None
    memory_budget: int  # bytes


@dataclass(frozen=True)
class SoftmaxOutput:
    """The loss of the global batch, equal on all ranks. All but ``loss`` is detached."""

    loss: Tensor  # []
    softmax_loss: Tensor  # []
    center_loss: Tensor  # [], weight included
    target_cosine: Tensor  # [], mean over the valid samples
    num_samples: Tensor  # [] int64
    loss_statistics: Tensor | None  # [k] float64, of this batch, for the loss's state
    center_offsets: Tensor | None  # [B, D] x − k of the samples that this shard owns, −0 for all others


def sharded_softmax(weight: Tensor, bias: Tensor | None, step: ShardStep) -> SoftmaxOutput:
    """Compute the loss of the global batch, differentiable if ``step.local.wants_grad``. A collective.

    Gradients: ``world_size · ∂loss/∂(local embeddings)`` (so that averaging over ranks gives the backbone's exact
    gradient), sparse rows for ``weight`` and ``bias``, unscaled, and the same full gradient of the loss's parameters
    on every rank.

    Args:
        weight: [rows of the shard, D] or [rows, K, D].
        bias: [rows] or None.
        step: the batch and all settings.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False), full_float32():
        output, gradients = _forward(weight, bias, step)
    if gradients is None:
        return output
    inputs = (step.local.embeddings, weight, bias)
    loss = _AttachGradients.apply(*inputs, output.loss, gradients, *step.loss.parameters())
    return dataclasses.replace(output, loss=loss)


@dataclass(frozen=True)
class _Gradients:
    """Gradients computed by the forward pass, and the inputs from which backward computes the others."""

    embeddings: Tensor  # [B, D] this shard's part of ∂loss/∂(raw embeddings)
    of_targets: Tensor  # [B, D] ∂loss/∂weight through the owned samples' own classes; −0 for all others
    targets: Tensor  # [B] int64: these classes among the active rows; 0 for all others
    nearest: Tensor | None  # [B] int64: their sub-centers
    by_sample: SampleGrads
    by_target: Tensor  # [B] ∂loss/∂similarity of the owned samples; −0 for all others
    negatives: CombinedNegatives
    kept: tuple[Tensor, ...]  # see NegativesForward
    collectives: Collectives
    local_count: int
    local_dtype: torch.dtype
    has_bias: bool


class _AttachGradients(torch.autograd.Function):
    """``apply(local_embeddings, weight, bias, loss, gradients, *loss_parameters)`` returns ``loss``, differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        local_embeddings: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        gradients: _Gradients,
        *parameters: Tensor,
    ) -> Tensor:
        # Saved tensors are freed by backward; the rest stays as long as the graph does.
        ctx.save_for_backward(weight, *gradients.kept)
        ctx.gradients = dataclasses.replace(gradients, kept=())
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad(), torch.autocast(grad_loss.device.type, enabled=False), full_float32():
            gradients = _backward(ctx, grad_loss)
        if not torch.is_grad_enabled():
            return gradients
        # create_graph=True: without a history of their own they would count as constants.
        history = torch.empty(0, requires_grad=True)
        return tuple(None if gradient is None else _RefuseBackward.apply(history, gradient) for gradient in gradients)


class _RefuseBackward(torch.autograd.Function):
    """``apply(anything that requires a gradient, gradient)`` returns the gradient, with a backward that raises."""

    @staticmethod
    def forward(ctx: Any, history: Tensor, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise DoubleBackward(
            "a gradient of PartialFC's loss cannot be differentiated again (create_graph=True, as for gradient "
            "penalties and Hessians): the head has first derivatives only"
        )


def _forward(weight: Tensor, bias: Tensor | None, step: ShardStep) -> tuple[SoftmaxOutput, _Gradients | None]:
    loss, embeddings, owned = step.loss, step.embeddings, step.owned
    norms = torch.linalg.vector_norm(embeddings, dim=1, dtype=torch.float64).clamp_min_(NORM_EPS)  # [B]
    unit_embeddings = embeddings if loss.raw_logits else embeddings / norms.to(embeddings.dtype)[:, None]
    targets = find_targets(owned, embeddings, norms, weight, bias, loss.raw_logits)
    samples, loss_statistics = _describe_samples(step, norms, targets)

    negatives = _sum_negatives(step, samples, unit_embeddings, weight, bias)
    center_offsets = None
    if step.center_loss is not None:
        centers = owned.of_class(step.center_loss.centers).to(embeddings.dtype)
        center_offsets = owned.only(embeddings - centers)
    stats = torch.cat((negatives.sample_stats, _target_stats(targets, center_offsets)), dim=1)
    if step.active.padding is not None:  # too short a list would leave out classes: never silently
        stats = stats.masked_fill(~step.active.padding.fits, torch.nan)
    step.collectives.sum(stats)
    of_negatives, of_targets = stats.tensor_split([negatives.sample_stats.shape[1]], dim=1)

    combined = negatives.combine(of_negatives)
    center_weight = 0.0 if step.center_loss is None else step.center_loss.weight
    batch = batch_loss(loss, samples, combined, center_weight, *of_targets.unbind(1))
    output = SoftmaxOutput(
        loss=batch.total.to(embeddings.dtype),
        softmax_loss=batch.softmax_loss.to(embeddings.dtype),
        center_loss=batch.center_loss.to(embeddings.dtype),
        target_cosine=batch.target_cosine.to(embeddings.dtype),
        num_samples=samples.valid.sum(),
        loss_statistics=loss_statistics,
        center_offsets=center_offsets,
    )
    if not step.local.wants_grad:
        return output, None

    return output, _prepare_backward(step, targets, negatives, combined, batch.grads, output, has_bias=bias is not None)


def _prepare_backward(
    step: ShardStep,
    targets: Targets,
    negatives: NegativesForward,
    combined: CombinedNegatives,
    grads: SampleGrads,
    output: SoftmaxOutput,
    has_bias: bool,
) -> _Gradients:
    """Compute the gradients that need no further walk over the classes: the embeddings' and the targets' own."""
    unit_embeddings, norms = combined.chunks.unit_embeddings, combined.chunks.samples.norms
    grad = negatives.finish_embedding_grad(combined, grads.negatives, grads.logit_sum)  # [B, D]
    if not step.loss.raw_logits:  # through the normalisation
        along = (unit_embeddings * grad).sum(dim=1, keepdim=True)
        grad.addcmul_(unit_embeddings, along, value=-1).div_(norms.to(grad.dtype)[:, None])
    of_owned = targets.embedding_grad(grads.similarity, grads.norms)
    if step.center_loss is not None and output.center_offsets is not None:
        count = output.num_samples.clamp_min(1).double()
        of_owned = of_owned + output.center_offsets * (step.center_loss.weight / count)
    grad.add_(of_owned.to(grad.dtype))
    return _Gradients(
        embeddings=grad,
        of_targets=targets.weight_grad(grads.similarity).to(grad.dtype),
        targets=step.active.index(step.owned.rows),
        nearest=targets.nearest,
        by_sample=grads,
        by_target=step.owned.only(grads.similarity),
        negatives=combined,
        kept=negatives.kept,
        collectives=step.collectives,
        local_count=len(step.local.embeddings),
        local_dtype=step.local.embeddings.dtype,
        has_bias=has_bias,
    )


def _describe_samples(step: ShardStep, norms: Tensor, targets: Targets) -> tuple[Samples, Tensor | None]:
    """Describe the batch to the loss, and return the statistics of a loss with a state.

    One collective if the loss needs the targets' cosines first.
    """
    loss, needs = step.loss, step.loss.needs
    samples = Samples(norms, step.labels >= 0, step.positions, step.local.step, step.seed)
    if "noise" in needs:
        noise = torch.empty(len(norms), 1, dtype=torch.float32, device=norms.device)
        normal_rows(stream_key(step.seed, RandomStream.NOISE, step.local.step), step.positions, 1, 1.0, noise)
        samples = dataclasses.replace(samples, noise=noise[:, 0].double())
    if "target_cosine_first" in needs:
        samples = dataclasses.replace(samples, target_cosine=step.collectives.sum(targets.cosines.clone()))
    state, statistics = loss.stateful.state, None
    if state is not None and step.local.training:
        statistics = loss.statistics(samples)
        assert statistics is not None, "a loss with a state must define statistics()"
        earlier = step.earlier_statistics
        state = loss.next_state(state, statistics if earlier is None else statistics + earlier)
    return dataclasses.replace(samples, state=state), statistics


def _sum_negatives(
    step: ShardStep, samples: Samples, unit_embeddings: Tensor, weight: Tensor, bias: Tensor | None
) -> NegativesForward:
    """Walk this shard's active rows. One collective if logits are unbounded."""
    loss, wants_grad, keep = step.loss, step.local.wants_grad, weight.requires_grad
    target_rows = torch.where(step.owned.mask, step.active.index(step.owned.rows), -1)
    chunks = ClassChunks(
        loss,
        samples,
        unit_embeddings,
        weight,
        bias,
        step.active,
        target_rows,
        step.products,
        step.filter_threshold,
        step.memory_budget,
    )
    if loss.shared_denominator:
        return log_sum_exp(chunks, step.collectives, "mean_logit" in loss.needs, wants_grad, keep)
    return softplus_sum(chunks, wants_grad, keep)


def _target_stats(targets: Targets, center_offsets: Tensor | None) -> Tensor:
    """Return the statistics that only the owner of a sample's class knows, to be summed over ranks, [B, k] float64.

    Columns: the similarity, the cosine, and with center loss ‖x − k‖².
    """
    stats = [targets.similarity, targets.cosines]
    if center_offsets is not None:
        stats.append(center_offsets.double().square().sum(dim=1))
    return torch.stack(stats, dim=1)


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    gradients: _Gradients = ctx.gradients
    weight, *kept = ctx.saved_tensors
    collectives = gradients.collectives
    wait_for_share = collectives.start_reduce_scatter(gradients.embeddings * (grad_loss * collectives.world_size))
    grad_weight = grad_bias = None
    if any(ctx.needs_input_grad[1:3]):  # while the embeddings' gradient travels
        grad_weight, grad_bias = _weight_grad(gradients, weight, grad_loss, tuple(kept))
    grad_embeddings = wait_for_share()[: gradients.local_count].to(gradients.local_dtype)
    grad_parameters = (None if grad is None else grad * grad_loss for grad in gradients.by_sample.parameters)
    return grad_embeddings, grad_weight, grad_bias, None, None, *grad_parameters


def _weight_grad(
    gradients: _Gradients, weight: Tensor, grad_loss: Tensor, kept: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor | None]:
    """Return the sparse gradients of the weight and the bias: the negatives' chunk by chunk, plus the targets'."""
    chunks, by_sample = gradients.negatives.chunks, gradients.by_sample
    active = chunks.active
    room = max(active.room, active.count)
    values = chunks.unit_embeddings.new_empty(room, *weight.shape[1:])[: active.count]  # [A, D] or [A, K, D]
    bias_values = chunks.unit_embeddings.new_empty(active.count) if gradients.has_bias else None  # [A]
    logit_sum_grad = None if by_sample.logit_sum is None else by_sample.logit_sum * grad_loss
    negatives = gradients.negatives.backward(by_sample.negatives * grad_loss, logit_sum_grad)
    weighted_embeddings = chunks.scaled_embeddings * negatives.sample_factors[:, None]  # [B, D]
    operand = chunks.products.weighted_embeddings(weighted_embeddings)
    for chunk in chunks:
        part = slice(chunk.start, chunk.stop)
        grads = negatives.logit_grads(chunk, kept)
        chunks.write_weight_grad(chunk, grads, operand, out=values[part])
        if bias_values is not None:
            assert grads.by_logit is not None, "kept only where there is no bias"
            torch.mv(grads.by_logit.t(), negatives.sample_factors, out=bias_values[part])

    rows = torch.arange(len(weight), device=weight.device) if active.rows is None else active.rows
    mark_sorted(rows, active.padding)
    if active.count:  # else no sample has its class here
        targets = gradients.targets
        if bias_values is not None:
            bias_values.index_add_(0, targets, (gradients.by_target * grad_loss).to(bias_values.dtype))
        if gradients.nearest is not None:
            targets = targets * weight.shape[1] + gradients.nearest
        of_targets = gradients.of_targets * grad_loss.to(gradients.of_targets.dtype)
        values.view(-1, weight.shape[-1]).index_add_(0, targets, of_targets)
    unique = active.padding is None
    grad_bias = None if bias_values is None else _sparse(rows, bias_values, weight.shape[:1], unique)
    return _sparse(rows, values, weight.shape, unique), grad_bias


def _sparse(rows: Tensor, values: Tensor, shape: torch.Size, unique: bool) -> Tensor:
    return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=unique, check_invariants=False)
