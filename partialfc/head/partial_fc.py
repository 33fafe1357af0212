"""PartialFC: the classifier whose classes are sharded over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partialfc.errors import ConfigError
from partialfc.head.center_loss import CenterLoss
from partialfc.head.collectives import Collectives
from partialfc.head.gather import BatchGather, GlobalBatch, LocalBatch, check_class_ids
from partialfc.head.optim.deferred_decay import apply_deferred_decay
from partialfc.head.optim.sparse_grads import all_finite, squared_norm
from partialfc.head.ownership import owned_samples
from partialfc.head.partition import ClassPartition
from partialfc.head.random import RandomStream, normal_rows, stream_key
from partialfc.head.sample_rate import SampleRate, largest_rate, rate_at
from partialfc.head.softmax.products import Precision, Products, default_precision
from partialfc.head.softmax.sampling import active_rows
from partialfc.head.softmax.sharded_softmax import ShardStep, sharded_softmax
from partialfc.head.step_state import StepState
from partialfc.head.validation import WEIGHT_DTYPES, check_loss, check_options, check_sizes, register_owner
from partialfc.losses import Loss

_INITIAL_STD = 0.01


@dataclass(frozen=True)
class HeadOutput:
    """The result of a call. All but ``num_active`` are equal on all ranks, and all but ``loss`` are detached."""

    loss: Tensor  # []: mean over the valid samples of the global batch, center loss included
    softmax_loss: Tensor  # []
    center_loss: Tensor  # []: its weight included; 0 without one
    target_cosine: Tensor  # []: mean cosine between an embedding and its own class
    num_samples: Tensor  # [] int64: samples of the global batch whose label is not -1
    num_active: Tensor  # [] int64: classes of this rank's shard that took part

    @property
    def active_rows(self) -> int:
        """Classes of this rank's shard that took part. To read it, the host may have to wait for a GPU."""
        return int(self.num_active)


class PartialFC(nn.Module):
    """A margin-softmax classifier over very many classes, its weight sharded by class over the ranks of a group.

    Each rank passes its own part of the batch; the ranks exchange embeddings and per-sample statistics, never weights
    or logits. See An et al., "Killing two birds with one stone: Partial FC", CVPR 2022, arXiv:2203.15565.

    Args:
        num_classes: C, classes of all shards together; ≥ 1. It may be smaller than the number of ranks.
        embedding_dim: D.
        loss: e.g. ``losses.ArcFace(scale=64.0, margin=0.5)``. A loss with a state or parameters belongs to this head
            from now on.
        sample_rate: share of the classes, in (0, 1], sampled as negatives in a step, besides the batch's own classes;
            or a function of the step. Evaluation always uses all classes.
        seed: of the initial weights and the negatives. Both are functions of the class id, whatever the world size.
        center_loss: e.g. ``CenterLoss(weight=0.003, alpha=0.5)``; owned by this head from now on.
        filter_threshold: negatives whose cosine exceeds it, in [-1, 1], are left out of the denominator (interclass
            filtering, for data sets in which one identity has several class ids); also for raw logits.
        correct_sampling: give classes that take part only because they were sampled the weight 1/sample_rate in the
            denominator, so that its expectation equals the sum over all classes.
        on_nonfinite: ``"raise"`` checks embeddings for NaN and Inf and raises NonFiniteEmbeddings on every rank;
            ``"propagate"`` passes them on as NaN loss and gradients on every rank, so that all loss scalers decide
            alike.
        weight_dtype: of the weight, float32, float64 or bfloat16 (which the ``Row*`` optimizers round stochastically).
        compute_dtype: of logits, gradients and centers, float32 or float64; default: ``weight_dtype``, for bfloat16
            float32.
        matmul_precision: of the matrix products of logits and gradients; the process's settings for TF32 do not
            matter. ``"highest"``: float32. ``"exact"``: each number as two or three of 16 bits, on a GPU's 16-bit
            units; within 1e-5 of the largest entry from float64, where float32 reaches half of that. ``"fast"``: 16-bit
            numbers (float16 for logits, bfloat16 for gradients), sums in float32, logits never stored in 16 bits; the
            mean loss within 5e-4, gradients within 3e-3 of their norm. Default: ``"exact"`` on NVIDIA GPUs from Ampere
            on, where its products are three to four times as fast as those of float32 (after measurements on an H100),
            ``"highest"`` elsewhere; a CPU only imitates the others. With float64 always ``"highest"``.
        memory_budget_mb: MiB for logits and working copies of the weight within a step. More lets backward reuse the
            forward pass's exponentials instead of forming them again.
        process_group: default: the default group if ``torch.distributed`` is initialised, else a single process.
        device: of the weight.

    Parameters: ``weight [C_local, D]``, or ``[C_local, K, D]`` with K sub-centers; with ``losses.Softmax(bias=True)``
    ``bias [C_local]``; the parameters of the loss (``losses.UCE``), the same on all ranks. Buffers: ``step``, int64,
    which advances once per optimizer step, applied or skipped, and the loss's ``state``, if it has one.

    Raises:
        ConfigError: an argument is of the wrong type, or out of its range.
    """

    step: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        loss: Loss,
        sample_rate: SampleRate = 1.0,
        seed: int = 0,
        center_loss: CenterLoss | None = None,
        filter_threshold: float | None = None,
        correct_sampling: bool = False,
        on_nonfinite: Literal["raise", "propagate"] = "raise",
        weight_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        matmul_precision: Precision | None = None,
        memory_budget_mb: float = 256,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        compute_dtype = compute_dtype or (torch.float32 if weight_dtype is torch.bfloat16 else weight_dtype)
        check_sizes(num_classes, embedding_dim, seed, memory_budget_mb)
        check_loss(loss)
        check_options(
            sample_rate, center_loss, filter_threshold, on_nonfinite, weight_dtype, compute_dtype, matmul_precision
        )
        self.num_classes, self.embedding_dim, self.loss = num_classes, embedding_dim, loss
        self.sample_rate, self.seed, self.center_loss = sample_rate, seed, center_loss
        self.filter_threshold, self.correct_sampling = filter_threshold, correct_sampling
        self.on_nonfinite, self.compute_dtype, self.memory_budget_mb = on_nonfinite, compute_dtype, memory_budget_mb
        self.matmul_precision = matmul_precision

        self.collectives = Collectives(process_group)
        self.partition = ClassPartition(num_classes, self.collectives.world_size)
        self.first_class, last = self.partition.range(self.collectives.rank)
        rows = last - self.first_class
        shape = (rows, embedding_dim) if loss.sub_centers is None else (rows, loss.sub_centers, embedding_dim)
        self.weight = nn.Parameter(torch.empty(shape, dtype=weight_dtype, device=device))
        self.bias = None
        if loss.class_bias:
            self.bias = nn.Parameter(torch.zeros(rows, dtype=compute_dtype, device=device))
        if center_loss is not None:
            center_loss.allocate(rows, embedding_dim, compute_dtype, self.weight.device)
        register_owner(loss, self)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._gatherer = BatchGather(self.collectives, num_classes, embedding_dim)
        self._step_state = StepState(self)
        self.register_state_dict_pre_hook(_before_saving)
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight, N(0, 0.01²), a function of (seed, class id); set all else to its initial value."""
        if self.weight.is_meta:
            return
        self.apply_deferred_decay()
        for zero in (self.bias, self.step, None if self.center_loss is None else self.center_loss.centers):
            if zero is not None:
                zero.zero_()
        self.restart_step()
        ids = torch.arange(self.first_class, self.first_class + len(self.weight), device=self.weight.device)
        if self.loss.sub_centers is not None:
            ids = ids[:, None] * self.loss.sub_centers + torch.arange(self.loss.sub_centers, device=ids.device)
        key = stream_key(self.seed, RandomStream.INITIAL_WEIGHT)
        rows = self.weight.view(-1, self.embedding_dim)
        normal_rows(key, ids.flatten(), self.embedding_dim, _INITIAL_STD, rows)
        self.loss.reset(self.num_classes, rate_at(self.sample_rate, 0))

    @torch._disable_dynamo  # torch.compiler.disable, which would import the compiler with this module
    def forward(self, embeddings: Tensor, labels: Tensor, step: int | None = None) -> HeadOutput:
        """Compute the loss of the global batch. A collective: every rank calls it, in the same mode.

        ``torch.compile`` of a module that holds the head breaks its graph here.

        Args:
            embeddings: [B_local, D], float32, float64, float16 or bfloat16; need not be normalised. B_local may differ
                between ranks and steps, and be 0, up to the largest of the first call.
            labels: [B_local] int64 in [0, num_classes), or -1 for a sample to ignore.
            step: seeds the negatives; default: the head's own counter.

        Returns:
            The output; after ``loss.backward()``, ``embeddings.grad`` is world_size · ∂loss/∂embeddings, and
            ``weight.grad`` the exact sparse gradient of the active rows.

        Raises:
            BatchMismatch, LabelOutOfRange, NonFiniteEmbeddings: on every rank, whichever rank is at fault; on a GPU at
                the next call of the head or of its optimizer's ``step()``, and nothing is updated until then.
            RankLost: another rank has died or cannot be reached.
            DoubleBackward: in a backward through a gradient of the loss (``create_graph=True``), which is a constant.
        """
        if torch.is_inference_mode_enabled():  # whose tensors the losses could not differentiate
            with torch.inference_mode(False), torch.no_grad():
                return self._compute(embeddings, labels, step)
        return self._compute(embeddings, labels, step)

    def _compute(self, embeddings: Tensor, labels: Tensor, step: int | None) -> HeadOutput:
        local = self._begin(embeddings, labels, step)
        batch = self._gather(local)  # collective 1
        shard = self._sample(local, batch)
        softmax = sharded_softmax(self.weight, self.bias, shard)  # collective 2; 3 in backward
        if local.wants_grad and local.training:
            self._step_state.track(softmax, shard.owned, local.embeddings)
        return HeadOutput(
            softmax.loss,
            softmax.softmax_loss,
            softmax.center_loss,
            softmax.target_cosine,
            softmax.num_samples,
            shard.active.number,
        )

    def _begin(self, embeddings: Tensor, labels: Tensor, step: int | None) -> LocalBatch:
        """Raise deferred errors, close a skipped step, and describe this call."""
        self.collectives.check_group()
        self._step_state.raise_deferred()
        if self.training:
            self._step_state.close_skipped()
        step = self._step_state.number if step is None else int(step)
        # Anything but a tensor is refused like a tensor of the wrong shape: on every rank, after the exchange.
        embeddings = embeddings if isinstance(embeddings, Tensor) else torch.empty(())
        labels = labels if isinstance(labels, Tensor) else torch.empty(())
        if embeddings.is_inference() or labels.is_inference():
            embeddings, labels = embeddings.clone(), labels.clone()
        trained = (embeddings, *self.parameters())
        wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
        rate = rate_at(self.sample_rate, step) if self.training else 1.0
        return LocalBatch(embeddings, labels, step, rate, self.training, wants_grad, self.on_nonfinite == "raise")

    def _gather(self, local: LocalBatch) -> GlobalBatch:
        """Gather the samples of all ranks; raise their errors, at once or later."""
        device = self.weight.device
        if self._gatherer.format is None and self.collectives.distributed:
            self._gatherer.agree_on_format(local.embeddings, self._settings(), device)
        batch = self._gatherer.gather(local, device)
        self._step_state.defer(batch.check)
        return batch

    def _sample(self, local: LocalBatch, batch: GlobalBatch) -> ShardStep:
        """Choose this shard's active rows, and bring them up to date."""
        start, stop = self.first_class, self.first_class + len(self.weight)
        owned = owned_samples(batch.labels, start, stop)
        active = active_rows(
            owned,
            start,
            stop,
            local.rate,
            self.seed,
            local.step,
            self.correct_sampling,
            self.compute_dtype,
            largest_rate(self.sample_rate, unknown=0.0),
        )
        self.apply_deferred_decay(active.rows)
        if self.weight.dtype is torch.bfloat16:
            self.weight.grad_dtype = self.compute_dtype  # keeps the rows' gradients from being rounded
        return ShardStep(
            local=local,
            embeddings=batch.embeddings.to(self.compute_dtype),
            labels=batch.labels,
            positions=batch.positions + self._step_state.samples_passed,
            owned=owned,
            active=active,
            products=Products(self.matmul_precision or default_precision(self.weight.device), self.compute_dtype),
            loss=self.loss,
            center_loss=self.center_loss,
            earlier_statistics=self._step_state.loss_statistics,
            collectives=self.collectives,
            seed=self.seed,
            filter_threshold=self.filter_threshold,
            memory_budget=int(self.memory_budget_mb * 2**20),
        )

    @torch.no_grad()
    def rows(self, class_ids: Tensor) -> Tensor:
        """Return the weights of any classes, [n, D] or [n, K, D], on every rank. A collective.

        Args:
            class_ids: [n] int64 in [0, num_classes), the same on every rank; may repeat.

        Raises:
            LabelOutOfRange: an id is outside [0, num_classes), on any rank.
            BatchMismatch: the ranks passed different ids.
        """
        self.collectives.check_group()
        ids = torch.as_tensor(class_ids, dtype=torch.int64, device=self.weight.device).flatten()
        check_class_ids(ids, self.num_classes, self.collectives)
        local = ids - self.first_class
        owned = (local >= 0) & (local < len(self.weight))
        self.apply_deferred_decay(local[owned])
        rows = self.weight.new_zeros(len(ids), *self.weight.shape[1:])
        rows[owned] = self.weight[local[owned]]
        return self.collectives.sum(rows)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Return the Euclidean norm of the weight's gradient over all shards, bias included, []. A collective."""
        of_classes = [self.weight, self.bias]  # not the loss's own parameters
        return self.collectives.sum(squared_norm(of_classes, self.weight.device)).sqrt()

    @torch.no_grad()
    def gradient_is_finite(self) -> Tensor:
        """Return a bool []: True if the next update is free of NaN and Inf: gradients and centers of this shard.

        Not a collective: the ranks must agree before one of them skips the step.
        """
        pending = [] if self.center_loss is None else self.center_loss.pending_offsets
        return all_finite(self.parameters(), pending, self.weight.device)

    def apply_deferred_decay(self, rows: Tensor | None = None) -> None:
        """Bring ``rows`` [n] int64 of this shard up to date, all by default.

        ``RowSGD(unsampled_rows="decayed")`` defers the decay of rows without a gradient. The head applies it to the
        rows that it uses, returns or saves; call this before reading ``weight`` in other ways.
        """
        apply_deferred_decay(self.weight, rows)
        apply_deferred_decay(self.bias, rows)

    def catch_up(self, rows: Tensor | None = None) -> None:
        """Call :meth:`apply_deferred_decay` by its deprecated name."""
        warnings.warn("head.catch_up() is now apply_deferred_decay()", DeprecationWarning, stacklevel=2)
        self.apply_deferred_decay(rows)

    def restart_step(self) -> None:
        """Discard the micro-batches of the current step, and re-read the counter.

        Call this after changing the head's buffers in place, as loading a checkpoint does.
        """
        self._step_state.restart()

    def reset_batch_format(self) -> None:
        """Forget the largest batch and the dtype that the ranks agreed on. The next call negotiates them again."""
        self._gatherer.format = None

    def extra_repr(self) -> str:
        rate = self.sample_rate if isinstance(self.sample_rate, float | int) else "schedule"
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, sample_rate={rate}, "
            f"classes {self.first_class}–{self.first_class + len(self.weight)} on rank {self.collectives.rank} "
            f"of {self.collectives.world_size}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        dtype = fn(self.weight.new_empty(0)).dtype
        if dtype not in WEIGHT_DTYPES:
            raise ConfigError(
                f"the head's weight may be torch.float32, torch.float64 or torch.bfloat16, not {dtype}; convert the "
                "backbone alone: the head takes embeddings of any of these dtypes and torch.float16"
            )
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        self.apply_deferred_decay()
        return self.__dict__.copy()

    def _settings(self) -> str:
        """Return the arguments that must be the same on every rank."""
        settings = (self.num_classes, self.embedding_dim, self.seed, self.loss, self.center_loss)
        filters = (self.filter_threshold, self.correct_sampling, self.on_nonfinite)
        return repr(settings + filters + (self.weight.dtype, self.compute_dtype, self.matmul_precision))


def _before_saving(head: PartialFC, prefix: str, keep_vars: bool) -> None:
    head._step_state.close_skipped()
    head.apply_deferred_decay()


def _before_loading(head: PartialFC, *_: Any) -> None:
    head.apply_deferred_decay()  # decay deferred for the replaced rows must not reach the new ones


def _after_loading(head: PartialFC, incompatible_keys: Any) -> None:
    head.restart_step()
