"""PartialFC: the classifier whose classes are sharded over ranks."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partialfc.errors import BatchMismatch, ConfigError, LabelOutOfRange
from partialfc.head import message as packing
from partialfc.head.center_loss import CenterLoss
from partialfc.head.collectives import Collectives
from partialfc.head.deferred_read import DeferredRead
from partialfc.head.optim import sparse_grads as gradients
from partialfc.head.optim.step_hooks import follow
from partialfc.head.partition import ClassPartition
from partialfc.head.random import normal_rows, stream_key
from partialfc.head.softmax.sampling import active_rows
from partialfc.head.softmax.sharded_softmax import ShardedSoftmax, ShardStep
from partialfc.head.validation import check_loss, check_options, check_sizes, claim
from partialfc.losses import Loss

_INITIAL_WEIGHT = 2  # the purpose that tells this stream of random numbers from the others
_INITIAL_STD = 0.01


@dataclass(frozen=True)
class HeadOutput:
    """What a step of the head gives. All but ``active_rows`` are equal on all ranks, and all but ``loss`` detached."""

    loss: Tensor  # []: mean over the samples of the global batch that count, center loss included
    softmax_loss: Tensor  # []
    center_loss: Tensor  # []: its weight included; 0 without one
    target_cosine: Tensor  # []: mean cosine between an embedding and its own class
    num_samples: Tensor  # [] int64: samples of the global batch whose label is not -1
    active_rows: int  # classes of this rank's shard that took part


class PartialFC(nn.Module):
    """A margin-softmax classifier over very many classes, its weight sharded by class over the ranks of a group.

    Each rank passes its own part of the batch; the ranks exchange embeddings and per-sample statistics, never weights
    or logits. See An et al., "Killing two birds with one stone: Partial FC", CVPR 2022, arXiv:2203.15565.

    Args:
        num_classes: C, classes of all shards together; ≥ 1. It may be smaller than the number of ranks.
        embedding_dim: D.
        loss: e.g. ``losses.ArcFace(scale=64.0, margin=0.5)``. One with a state or parameters belongs to this head from
            now on.
        sample_rate: share of the classes, in (0, 1], drawn as negatives in a step, besides the batch's own classes; or
            a function of the step. Evaluation always uses all classes.
        seed: of the initial weights and the negatives. Both are functions of the class id, whatever the world size.
        center_loss: e.g. ``CenterLoss(weight=0.003, alpha=0.5)``; owned by this head from now on.
        filter_threshold: negatives whose cosine exceeds it, in [-1, 1], are left out of the denominator (interclass
            filtering, for data sets in which one identity occurs under several ids); also for raw logits.
        correct_sampling: weight classes that take part only because they were drawn by 1/sample_rate in the
            denominator, so that its expectation is that of all classes.
        on_nonfinite: ``"raise"`` checks embeddings for NaN and Inf and raises NonFiniteEmbeddings on every rank;
            ``"propagate"`` lets them through, and makes loss and gradients NaN on every rank, so that loss scalers
            and the like decide alike everywhere.
        weight_dtype: of the weight, float32, float64 or bfloat16 (which the ``Row*`` optimizers round stochastically).
        compute_dtype: of logits, gradients and centers, float32 or float64; default: ``weight_dtype``, for bfloat16
            float32.
        memory_budget_mb: MiB for logits and working copies of the weight within a step. More lets backward reuse the
            forward pass's exponentials instead of forming them again.
        process_group: default: the default group if ``torch.distributed`` is initialised, else a single process.
        device: of the weight.

    Parameters: ``weight [C_local, D]``, or ``[C_local, K, D]`` with K sub-centers; with ``losses.Softmax(bias=True)``
    ``bias [C_local]``; those of the loss (``losses.UCE``), the same on all ranks. Buffers: ``step``, int64, which
    advances once per optimizer step, applied or skipped, and the loss's ``state``, if it has one.

    Raises:
        ConfigError: an argument is out of its range.
    """

    step: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        loss: Loss,
        sample_rate: float | Callable[[int], float] = 1.0,
        seed: int = 0,
        center_loss: CenterLoss | None = None,
        filter_threshold: float | None = None,
        correct_sampling: bool = False,
        on_nonfinite: Literal["raise", "propagate"] = "raise",
        weight_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        memory_budget_mb: float = 256,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        compute_dtype = compute_dtype or (torch.float32 if weight_dtype is torch.bfloat16 else weight_dtype)
        check_sizes(num_classes, embedding_dim, memory_budget_mb)
        check_loss(loss)
        check_options(loss, sample_rate, filter_threshold, on_nonfinite, weight_dtype, compute_dtype)
        self.num_classes, self.embedding_dim, self.loss = num_classes, embedding_dim, loss
        self.sample_rate, self.seed, self.center_loss = sample_rate, seed, center_loss
        self.filter_threshold, self.correct_sampling = filter_threshold, correct_sampling
        self.on_nonfinite, self.compute_dtype, self.memory_budget_mb = on_nonfinite, compute_dtype, memory_budget_mb

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
        claim(loss, self)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._next_step: int | None = None  # what `step` holds, where reading the buffer would wait for a device
        self._batch_format: packing.BatchFormat | None = None
        self._in_step = False  # a backward has run since the last optimizer step
        # Of the step's micro-batches that have run backward: samples passed, and the loss's statistics.
        self._samples_passed: int | Tensor = 0
        self._loss_statistics: Tensor | None = None
        self._unread: DeferredRead | None = None  # headers on their way to the host
        self.register_state_dict_pre_hook(_before_saving)
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight, N(0, 0.01²), a function of (seed, class id); set all else to its initial value."""
        if not self.weight.is_meta:
            self.catch_up()
            for zero in (self.bias, self.step, None if self.center_loss is None else self.center_loss.centers):
                if zero is not None:
                    zero.zero_()
            self.forget_step()
            ids = torch.arange(self.first_class, self.first_class + len(self.weight), device=self.weight.device)
            if self.loss.sub_centers is not None:
                ids = ids[:, None] * self.loss.sub_centers + torch.arange(self.loss.sub_centers, device=ids.device)
            rows = self.weight.view(-1, self.embedding_dim)
            normal_rows(stream_key(self.seed, _INITIAL_WEIGHT), ids.flatten(), self.embedding_dim, _INITIAL_STD, rows)
            self.loss.reset(self.num_classes, self._rate_at(0))

    def forward(self, embeddings: Tensor, labels: Tensor, step: int | None = None) -> HeadOutput:
        """The loss of the global batch. A collective: every rank calls it, in the same mode.

        Args:
            embeddings: [B_local, D], float32, float64, float16 or bfloat16; need not be normalised. B_local may differ
                between ranks and steps, and be 0, up to the largest of the first call.
            labels: [B_local] int64 in [0, num_classes), or -1 for a sample that does not count.
            step: seeds the negatives; default: the head's own counter.

        Returns:
            The output; after ``loss.backward()``, ``embeddings.grad`` is world_size · ∂loss/∂embeddings, and
            ``weight.grad`` the exact sparse gradient of the active rows.

        Raises:
            BatchMismatch, LabelOutOfRange, NonFiniteEmbeddings: on every rank, whichever rank is at fault; on a GPU at
                the next call of the head or of its optimizer's ``step()``, and nothing is updated until then.
            RankLost: another rank has died or cannot be reached.
        """
        self.collectives.check_group()
        self._raise_unread()
        if self.training:
            self._close_skipped_step()
        # What is no tensor at all is refused like a tensor of the wrong shape: on every rank, after the exchange.
        embeddings = embeddings if isinstance(embeddings, Tensor) else torch.empty(())
        labels = labels if isinstance(labels, Tensor) else torch.empty(())
        step = self._current_step() if step is None else int(step)
        rate = self._rate(step)
        parameters = list(self.loss.parameters())
        trained = (embeddings, self.weight, *parameters)
        wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)

        x, y, counts = self._gather(embeddings, labels, step, rate, wants_grad)  # collective 1: [B, D], [B], [W]
        last = self.first_class + len(self.weight)
        active = active_rows(
            y, self.first_class, last, rate, self.seed, step, self.correct_sampling, self.compute_dtype
        )
        self.catch_up(active.rows)
        if self.weight.dtype is torch.bfloat16:
            self.weight.grad_dtype = self.compute_dtype  # rows' gradients are not to be rounded
        shard = ShardStep(
            loss=self.loss,
            collectives=self.collectives,
            embeddings=x.to(self.compute_dtype),
            labels=y,
            positions=self._positions(counts, len(y)),
            local_count=len(embeddings),
            first_class=self.first_class,
            active=active,
            step=step,
            seed=self.seed,
            filter_threshold=self.filter_threshold,
            memory_budget=int(self.memory_budget_mb * 2**20),
            center_loss=self.center_loss,
            earlier_statistics=self._loss_statistics,
            wants_grad=wants_grad,
            training=self.training,
        )
        # Collectives 2 and, backward, 3.
        loss = ShardedSoftmax.apply(embeddings, self.weight, self.bias, shard, *parameters)
        found = shard.statistics
        assert found is not None
        if wants_grad and self.training:
            follow(self)
            loss.register_hook(partial(self._enter_step, [(found.num_samples, found.of_loss)]))
        return HeadOutput(
            loss, found.softmax_loss, found.center_loss, found.target_cosine, found.num_samples, active.count
        )

    @torch.no_grad()
    def rows(self, class_ids: Tensor) -> Tensor:
        """Weights of any classes, [n, D] or [n, K, D], on every rank. A collective: every rank passes the same
        ``class_ids``.

        Raises:
            LabelOutOfRange: an id is outside [0, num_classes), on any rank.
            BatchMismatch: the ranks passed different ids.
        """
        self.collectives.check_group()
        ids = torch.as_tensor(class_ids, dtype=torch.int64, device=self.weight.device).flatten()
        outside = ids[(ids < 0) | (ids >= self.num_classes)]
        digest = zlib.crc32(ids.cpu().numpy().tobytes())
        mine = torch.tensor([len(ids), digest, len(outside), int(outside[0]) if len(outside) else 0])
        asked = self.collectives.gather(mine.to(ids.device)).tolist()
        for rank, (_, _, wrong, example) in enumerate(asked):
            if wrong:
                raise LabelOutOfRange(f"rank {rank}: class id {example} is outside [0, {self.num_classes})")
        if any(other[:2] != asked[0][:2] for other in asked):
            raise BatchMismatch("rows() needs the same class ids on every rank; gather them first")
        local = ids - self.first_class
        mine_too = (local >= 0) & (local < len(self.weight))
        self.catch_up(local[mine_too])
        found = self.weight.new_zeros(len(ids), *self.weight.shape[1:])
        found[mine_too] = self.weight[local[mine_too]]
        return self.collectives.sum(found)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Euclidean norm of the weight's gradient over all shards, []. A collective."""
        of_classes = [self.weight, self.bias]  # not the loss's own parameters
        return self.collectives.sum(gradients.squared_norm(of_classes, self.weight.device)).sqrt()

    @torch.no_grad()
    def gradient_is_finite(self) -> Tensor:
        """Whether all that the next update takes in is, [] bool: the gradients of this shard, and what its centers move
        by. No collective: the ranks have to agree before one of them skips the step.
        """
        pending = [] if self.center_loss is None else self.center_loss.pending_offsets
        return gradients.all_finite(self.parameters(), pending, self.weight.device)

    def catch_up(self, rows: Tensor | None = None) -> None:
        """Have the optimizer apply what it owes to ``rows [n]`` of this shard, all by default (``RowSGD`` with decayed
        rows owes something). The head does so for what it uses or saves; call it before reading ``weight`` otherwise.
        """
        for parameter in (self.weight, self.bias):
            owed = getattr(parameter, "catch_up", None)
            if owed is not None:
                owed(rows)

    def __getstate__(self) -> dict[str, Any]:
        self.catch_up()
        return self.__dict__.copy()

    def reset_batch_format(self) -> None:
        """Forget the largest batch and the dtype agreed at the first call: the next one, on every rank, agrees anew."""
        self._batch_format = None

    def extra_repr(self) -> str:
        rate = self.sample_rate if isinstance(self.sample_rate, float | int) else "schedule"
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, sample_rate={rate}, "
            f"classes {self.first_class}–{self.first_class + len(self.weight)} on rank {self.collectives.rank} "
            f"of {self.collectives.world_size}"
        )

    # --- the batch -------------------------------------------------------------------------------------------------

    def _gather(
        self, embeddings: Tensor, labels: Tensor, step: int, rate: float, wants_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The global batch, [B, D] and [B], and each rank's samples of it, [W]; raises the same error on every rank if
        any rank's part is wrong.
        """
        device = self.weight.device
        flags = packing.FLAG_TRAINING * self.training | packing.FLAG_BACKWARD * wants_grad
        agreed = self._agree_on_format(embeddings)
        problem = packing.find_problem(embeddings, labels, self.embedding_dim, device, agreed)
        header = packing.make_header(embeddings, problem, flags, step, rate, device)
        found_by_host = problem[0] is not packing.Problem.NONE
        if not found_by_host:
            packing.check_values(header, embeddings, labels, self.num_classes, self.on_nonfinite == "raise")
        if agreed is None:  # a single process: nothing to send
            headers, x, y = header[None], embeddings.detach(), labels
        else:
            message = packing.pack(header, embeddings, labels, agreed, found_by_host)
            headers, y, x = packing.unpack(self.collectives.gather(message), agreed)
        if (agreed is None and found_by_host) or not self._errors_are_deferred():
            packing.raise_problem(headers.tolist(), self.num_classes, self.embedding_dim, agreed)
        else:
            self._unread = DeferredRead(headers)
            failed = packing.any_problem(headers)  # then no sample counts, and nothing is updated
            y = torch.where(failed, torch.full_like(y, -1), y)
        x = x.masked_fill((y < 0)[:, None], 0.0)  # what is ignored has no influence, not even as NaN
        return x, y, headers[:, packing.Field.COUNT]

    def _positions(self, counts: Tensor, batch: int) -> Tensor:
        """[B]: positions of the gathered samples in the step's batch, in rank order, after earlier micro-batches."""
        within = torch.arange(batch // len(counts), device=counts.device)
        return ((counts.cumsum(0) - counts)[:, None] + within).flatten() + self._samples_passed

    def _agree_on_format(self, embeddings: Tensor) -> packing.BatchFormat | None:
        """At the first call: check that the ranks' heads are the same, and agree on batch size and dtype."""
        if self._batch_format is None and self.collectives.distributed:
            settings = (self.num_classes, self.embedding_dim, self.seed, self.loss, self.center_loss)
            filters = (self.filter_threshold, self.correct_sampling, self.on_nonfinite)
            dtypes = (self.weight.dtype, self.compute_dtype)
            identity = zlib.crc32(repr(settings + filters + dtypes).encode())
            count = embeddings.shape[0] if embeddings.dim() else 0
            mine = torch.tensor([count, packing.dtype_code(embeddings.dtype), identity], device=self.weight.device)
            ranks = self.collectives.gather(mine).tolist()
            for rank, (_, dtype, other) in enumerate(ranks):
                if other != ranks[0][2]:
                    raise BatchMismatch(
                        f"the heads of rank 0 and rank {rank} differ: num_classes, embedding_dim, loss, "
                        "seed and all other arguments must be the same on every rank"
                    )
                if dtype != ranks[0][1]:
                    raise BatchMismatch(f"embeddings of rank 0 and rank {rank} differ in dtype; use one dtype")
            capacity = max(1, *(count for count, _, _ in ranks))
            dtype = ranks[0][1]
            # A dtype that is no float is refused right after, from the headers; any float will do to carry them.
            carried = packing.dtype_of(dtype) if dtype >= 0 and packing.dtype_of(dtype).is_floating_point else None
            agreed = packing.BatchFormat(capacity, self.embedding_dim, carried or torch.float32)
            if carried is None:
                return agreed
            self._batch_format = agreed
        return self._batch_format

    def _rate(self, step: int) -> float:
        """The sample rate of this step; 1 in evaluation."""
        if not self.training:
            return 1.0
        return self._rate_at(step)

    def _rate_at(self, step: int) -> float:
        rate = self.sample_rate(step) if callable(self.sample_rate) else self.sample_rate
        if not 0.0 < rate <= 1.0:
            raise ConfigError(f"sample_rate must lie in (0, 1], got {rate} at step {step}")
        return rate

    # --- the step counter, and errors that arrive late ---------------------------------------------------------------

    def _current_step(self) -> int:
        if self._next_step is None:
            self._next_step = int(self.step)
        return self._next_step

    def forget_step(self) -> None:
        """Another state was loaded: read the step from its buffer, and drop what micro-batches have left behind."""
        self._next_step = None
        self._drop_pending()

    def _drop_pending(self) -> None:
        """Forget what the micro-batches of the current step have left behind."""
        self._in_step, self._samples_passed, self._loss_statistics = False, 0, None
        if self.center_loss is not None:
            self.center_loss.drop_pending()

    def _enter_step(self, news: list[tuple[Tensor, Tensor | None]], grad: Tensor) -> None:
        self._close_skipped_step()  # here too: zero_grad() may stand between forward and backward
        if self._in_step and self._sparse_sums_concatenate():
            self._merge_gradients()
        self._in_step = True
        while news:  # a second backward through a retained graph sees the same samples
            samples, statistics = news.pop()
            self._samples_passed = self._samples_passed + samples
            if statistics is not None:
                earlier = self._loss_statistics
                self._loss_statistics = statistics if earlier is None else earlier + statistics

    def _sparse_sums_concatenate(self) -> bool:
        """Whether torch appends the rows of a second sparse gradient; on a CPU it merges sorted ones."""
        return self.weight.device.type != "cpu"

    @torch.no_grad()
    def _merge_gradients(self) -> None:
        """Merge what earlier micro-batches have left: memory is to follow the union of their rows, not the sum."""
        for parameter in (self.weight, self.bias):
            if parameter is not None and parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()

    def _close_skipped_step(self) -> None:
        """A backward whose gradient was cleared without an optimizer step (a loss scaler does that) ends its step."""
        if self._in_step and self.weight.grad is None:
            self._end_step(applied=False)

    def _end_step(self, applied: bool) -> None:
        if applied:
            if self.center_loss is not None:
                self.center_loss.apply_pending()
            state = self.loss.stateful.state
            if state is not None and self._loss_statistics is not None:
                state.copy_(self.loss.next_state(state, self._loss_statistics))
        self._drop_pending()
        self._next_step = self._current_step() + 1
        self.step.fill_(self._next_step)

    def before_optimizer_step(self) -> None:
        """Called before the step of the optimizer that holds the weight: raises what a GPU has found meanwhile."""
        self._raise_unread()

    def after_optimizer_step(self) -> None:
        """Called after that step: moves the centers and advances the counter."""
        if self._in_step:
            self._end_step(applied=True)

    def _errors_are_deferred(self) -> bool:
        return self.weight.device.type != "cpu"

    def _raise_unread(self) -> None:
        """Raise what the headers of the last call report, where nobody has looked yet."""
        if self._unread is not None:
            headers, self._unread = self._unread.read(), None
            try:
                packing.raise_problem(headers, self.num_classes, self.embedding_dim, self._batch_format)
            except Exception:
                self._drop_pending()
                raise


def _before_saving(head: PartialFC, prefix: str, keep_vars: bool) -> None:
    head._close_skipped_step()
    head.catch_up()


def _before_loading(head: PartialFC, *_: Any) -> None:
    head.catch_up()  # what is owed to the rows that are replaced must not fall on the new ones


def _after_loading(head: PartialFC, incompatible_keys: Any) -> None:
    head.forget_step()
