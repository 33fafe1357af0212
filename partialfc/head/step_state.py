"""The life of a step: micro-batches accumulate, then the optimizer steps or skips.

A step begins with the first backward after an optimizer step. It ends with the next step of the optimizer that holds
the weight, or unapplied, when the gradient was cleared without one, as a loss scaler does after an overflow. Either way
the counter advances once; centers and the loss's state move only with an applied step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from partialfc.head.center_loss import CenterLoss
from partialfc.head.optim.sparse_grads import is_known_sorted
from partialfc.head.optim.step_hooks import add_step_listener
from partialfc.head.ownership import OwnedSamples
from partialfc.head.softmax.sharded_softmax import SoftmaxOutput
from partialfc.losses import Loss


class SteppingHead(Protocol):
    """The parts of a head that follow its optimizer."""

    weight: Any  # an nn.Parameter
    bias: Any  # an nn.Parameter, or None
    loss: Loss
    center_loss: CenterLoss | None
    step: Tensor  # [] int64


@dataclass(frozen=True)
class _MicroBatch:
    """The part of a step that one backward adds."""

    num_samples: Tensor  # [] int64
    loss_statistics: Tensor | None  # [k] float64, for the loss's state
    owned: OwnedSamples
    center_offsets: Tensor | None  # [B, D] x − k of the owned samples, with center loss


class StepState:
    """The current step of a head. Listens to the optimizer that holds the head's weight.

    Args:
        head: the owner.
    """

    def __init__(self, head: SteppingHead) -> None:
        self._head = head
        self._number: int | None = None  # value of `head.step`, where reading the buffer would wait for a device
        self._under_way = False  # a backward has run since the last optimizer step
        self._deferred_check: Callable[[], None] | None = None  # raises errors that the host has not read yet
        self.samples_passed: int | Tensor = 0  # by micro-batches that have run backward
        self.loss_statistics: Tensor | None = None  # [k] float64, their sum

    @property
    def weight(self) -> Tensor:
        """The head's weight."""
        return self._head.weight

    @property
    def number(self) -> int:
        """Step counter, cached on the host."""
        if self._number is None:
            self._number = int(self._head.step)
        return self._number

    def restart(self) -> None:
        """Discard the step's micro-batches, and re-read the counter: its buffer was changed."""
        self._number = None
        self._discard()

    def defer(self, check: Callable[[], None] | None) -> None:
        """Run ``check``, which may raise, at the next call of the head or of its optimizer's ``step()``."""
        self._deferred_check = check

    def raise_deferred(self) -> None:
        """Raise the errors of the last call that the host has not read yet."""
        if self._deferred_check is not None:
            check, self._deferred_check = self._deferred_check, None
            try:
                check()
            except Exception:
                self._discard()
                raise

    def track(self, softmax: SoftmaxOutput, owned: OwnedSamples) -> None:
        """Add a micro-batch to the step once backward runs through its loss.

        Args:
            softmax: output of the micro-batch, whose loss has a gradient.
            owned: the samples whose classes this shard owns.
        """
        add_step_listener(self)
        micro_batch = _MicroBatch(softmax.num_samples, softmax.loss_statistics, owned, softmax.center_offsets)
        softmax.loss.register_hook(partial(self._enter, [micro_batch]))

    def close_skipped(self) -> None:
        """End the step if its gradient was cleared without an optimizer step, as a loss scaler does."""
        if self._under_way and self.weight.grad is None:
            self._end(applied=False)

    def before_optimizer_step(self) -> None:
        """Raise errors that the device found meanwhile, before anything is updated."""
        self.raise_deferred()

    def after_optimizer_step(self) -> None:
        """Move the centers and the loss's state, and advance the counter."""
        if self._under_way:
            self._end(applied=True)

    def _enter(self, new: list[_MicroBatch], grad: Tensor) -> None:
        self.close_skipped()  # here too: zero_grad() may stand between forward and backward
        if self._under_way and sparse_sums_concatenate(self.weight.device):
            self._merge_gradients()
        self._under_way = True
        if not new:
            return  # a second backward through a retained graph sees the same samples
        micro_batch = new.pop()
        self.samples_passed = self.samples_passed + micro_batch.num_samples
        if micro_batch.loss_statistics is not None:
            earlier = self.loss_statistics
            added = micro_batch.loss_statistics
            self.loss_statistics = added if earlier is None else earlier + added
        if self._head.center_loss is not None and micro_batch.center_offsets is not None:
            self._head.center_loss.accumulate(micro_batch.owned, micro_batch.center_offsets)

    @torch.no_grad()
    def _merge_gradients(self) -> None:
        """Merge the gradients of earlier micro-batches: memory then follows the union of their rows, not the sum."""
        for parameter in (self._head.weight, self._head.bias):
            grad = None if parameter is None else parameter.grad
            if parameter is not None and grad is not None and grad.is_sparse and not is_known_sorted(grad):
                parameter.grad = grad.coalesce()

    def _end(self, applied: bool) -> None:
        head = self._head
        if applied:
            if head.center_loss is not None:
                head.center_loss.apply_pending()
            state = head.loss.stateful.state
            if state is not None and self.loss_statistics is not None:
                state.copy_(head.loss.next_state(state, self.loss_statistics))
        self._discard()
        self._number = self.number + 1
        head.step.fill_(self._number)

    def _discard(self) -> None:
        self._under_way, self.samples_passed, self.loss_statistics = False, 0, None
        if self._head.center_loss is not None:
            self._head.center_loss.discard_pending()


def sparse_sums_concatenate(device: torch.device) -> bool:
    """Return True where torch appends the rows of a second sparse gradient; on a CPU it merges sorted ones."""
    return device.type != "cpu"
