"""The life of a step: calls of the head add up, then the optimizer steps or skips.

A call joins the step when a backward has added its gradient. Several calls may share a backward (two views, a sum), and
several backwards a step (micro-batches); ``torch.autograd.grad`` only looks. The step ends with the next step of the
optimizer that holds the weight, or unapplied, when the gradient was cleared without one, as a loss scaler does after an
overflow. Either way the counter advances once; centers and the loss's state move only with an applied step.

A frozen head follows a parameter of the backbone instead, and all that it has moves with an applied step only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import ref

from torch import Tensor, nn

from partialfc.head.center_loss import CenterLoss
from partialfc.head.optim.accumulation import Accumulator, torch_appends
from partialfc.head.optim.step_hooks import add_accumulation_listener, add_step_listener, current_backward
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


@dataclass(eq=False)
class _Call:
    """A call of the head in training."""

    leaf: Tensor  # once a backward has added to its gradient the call has joined the step
    num_samples: Tensor  # [] int64
    loss_statistics: Tensor | None  # [k] float64, for the loss's state
    owned: OwnedSamples
    center_offsets: Tensor | None  # [B, D] x − k of the owned samples, with center loss
    reached_by: int | None = None  # the last backward, or look at a gradient, that has come here
    joined: bool = False


class StepState:
    """The step of a head that is under way. Listens to the gradient and to the optimizer of the head's weight.

    Args:
        head: the owner.
    """

    def __init__(self, head: SteppingHead) -> None:
        self._head = head
        self._number: int | None = None  # value of `head.step`, where reading the buffer would wait for a device
        self._under_way = False  # a backward has added to the gradient since the last optimizer step
        self._backward: int | None = None  # the backward that has reached a call last
        self._found_cleared = False  # it has found the gradient of the step under way cleared
        self._reached: list[_Call] = []  # by backwards and looks since the last call
        self._accumulators: list[Accumulator] = []  # of the sparse gradients, where torch would append
        self._behind: ref[Tensor] | None = None  # the leaf that a frozen head follows
        self._deferred_check: Callable[[], None] | None = None  # raises errors that the host has not read yet
        self.samples_passed: int | Tensor = 0  # by the calls that have joined
        self.loss_statistics: Tensor | None = None  # [k] float64, their sum

    def __getstate__(self) -> dict[str, Any]:
        of_graphs: dict[str, Any] = {"_reached": [], "_behind": None, "_backward": None, "_accumulators": []}
        return self.__dict__ | of_graphs  # a copy has none

    @property
    def number(self) -> int:
        """Step counter, cached on the host."""
        if self._number is None:
            self._number = int(self._head.step)
        return self._number

    @property
    def followed(self) -> list[Tensor]:
        """The tensors whose optimizer ends the step."""
        leaf = self._leaf()
        return [self._head.weight] if leaf is None else [self._head.weight, leaf]

    def restart(self) -> None:
        """Discard the step's calls, and re-read the counter: its buffer was changed."""
        self._number = None
        self._discard()
        self._reached.clear()

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

    def track(self, softmax: SoftmaxOutput, owned: OwnedSamples, embeddings: Tensor) -> None:
        """Let a call join the step once a backward through its loss has added to the gradient.

        Args:
            softmax: output of the call, whose loss has a gradient.
            owned: the samples whose classes this shard owns.
            embeddings: of the call.
        """
        leaf = self._trained() if self._trained() is not None else _first_leaf(embeddings)
        if leaf is None:
            return  # of a frozen head: there is nothing to train
        if current_backward() is None:
            self._reached.clear()  # what has not joined by now was looked at
        add_step_listener(self)
        add_accumulation_listener(self, leaf)
        self._merge_sums()
        call = _Call(leaf, softmax.num_samples, softmax.loss_statistics, owned, softmax.center_offsets)
        softmax.loss.register_hook(partial(self._reach, call))

    def close_skipped(self) -> None:
        """End the step if its gradient was cleared without an optimizer step, as a loss scaler does.

        Not while a backward runs: the call is then activation checkpointing's, and has to compute what it computed.
        """
        if self._under_way and current_backward() is None and self._is_cleared():
            self._end(applied=False)

    def before_optimizer_step(self) -> None:
        """Raise errors that the device found meanwhile, before anything is updated."""
        self.raise_deferred()
        leaf = self._leaf()
        if not self._under_way and leaf is not None and leaf.grad is not None:
            # Nothing was added to this gradient: it was taken with torch.autograd.grad and assigned.
            self._join([call for call in self._reached if not call.joined])

    def after_optimizer_step(self) -> None:
        """Move the centers and the loss's state, and advance the counter."""
        if self._under_way:
            self._end(applied=True)
        self._reached.clear()

    def after_accumulation(self, leaf: Tensor) -> None:
        """Let the calls that this backward has come through join the step."""
        backward = current_backward()
        calls = [call for call in self._reached if call.reached_by == backward and call.leaf is leaf]
        if not calls:
            return  # a backward that did not come through the head, as of a penalty on the weight
        if self._found_cleared:  # zero_grad() stood between forward and backward
            self._end(applied=False)
        if self._trained() is None:
            self._behind = ref(leaf)
        self._join(calls)

    def _reach(self, call: _Call, grad: Tensor) -> None:
        """Note that a backward, or a look at a gradient, has come to the loss of a call."""
        backward = current_backward()
        if backward != self._backward:  # its first call
            self._backward = backward
            self._found_cleared = self._under_way and self._is_cleared()
        call.reached_by = backward
        if call not in self._reached:
            self._reached.append(call)

    def _join(self, calls: list[_Call]) -> None:
        self._under_way = self._under_way or bool(calls)
        for call in calls:
            if call.joined:
                continue  # a second backward through a retained graph sees the same samples
            call.joined = True
            self.samples_passed = self.samples_passed + call.num_samples
            if call.loss_statistics is not None:
                earlier = self.loss_statistics
                self.loss_statistics = call.loss_statistics if earlier is None else earlier + call.loss_statistics
            if self._head.center_loss is not None and call.center_offsets is not None:
                self._head.center_loss.accumulate(call.owned, call.center_offsets)

    def _merge_sums(self) -> None:
        """Let the gradients of micro-batches merge: memory then follows the union of their rows, not the sum."""
        of_rows = [each for each in (self._head.weight, self._head.bias) if each is not None and each.requires_grad]
        appended = [parameter for parameter in of_rows if torch_appends(parameter)]
        known = self._accumulators
        if len(known) != len(appended) or not all(map(Accumulator.adds_for, known, appended)):
            for accumulator in known:
                accumulator.remove()
            self._accumulators = [Accumulator(parameter) for parameter in appended]

    def _end(self, applied: bool) -> None:
        head = self._head
        if applied:
            if head.center_loss is not None:
                head.center_loss.apply_pending()
            state = head.loss.stateful.state
            if state is not None and self.loss_statistics is not None:
                state.copy_(head.loss.next_state(state, self.loss_statistics))
        self._discard()
        if applied or self._trained() is not None:
            self._number = self.number + 1
            head.step.fill_(self._number)

    def _discard(self) -> None:
        self._under_way, self._found_cleared, self.samples_passed, self.loss_statistics = False, False, 0, None
        if self._head.center_loss is not None:
            self._head.center_loss.discard_pending()

    def _trained(self) -> Tensor | None:
        """Return the first parameter of the head that is trained; None if it is frozen."""
        parameters = (self._head.weight, self._head.bias, *self._head.loss.parameters())
        return next((each for each in parameters if each is not None and each.requires_grad), None)

    def _leaf(self) -> Tensor | None:
        """Return the leaf whose gradient is followed; None while a frozen head follows none."""
        trained = self._trained()
        return trained if trained is not None or self._behind is None else self._behind()

    def _is_cleared(self) -> bool:
        """Return true if the gradient of the step under way is gone."""
        leaf = self._leaf()
        # Behind a frozen head, a leaf that is no parameter is a new one in each step.
        gone = leaf is None or leaf.grad is None
        return gone or (self._trained() is None and not isinstance(leaf, nn.Parameter))


def _first_leaf(output: Tensor) -> Tensor | None:
    """Return a leaf that a backward through ``output`` adds a gradient to, the nearest on one path."""
    if output.is_leaf:
        return output
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            leaf: Tensor = getattr(node, "variable")  # noqa: B009 (torch's types do not know it)
            return leaf
        nodes += [parent for parent, _ in node.next_functions]
    return None
