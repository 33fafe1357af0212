"""Decay and momentum of rows without a gradient, applied when the rows are read.

With zero gradient, a step of SGD is linear in a row's weight and velocity, and the same for all rows: a 2×2 matrix. So
each row only remembers its last applied step, and the product of the matrices since then brings it up to date.

The record belongs to the parameter, not to its optimizer: code that is about to use rows calls
:func:`apply_deferred_decay`, even after the optimizer has been replaced.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from partialfc.head.optim.working_rows import WorkingRows, rows_per_piece
from partialfc.head.random import RandomStream, stream_key
from partialfc.head.transfers import send


class DeferredDecay:
    """Steps not yet applied to the rows of a parameter that had no gradient in them.

    For each past step it keeps the product of the matrices of all later steps, and multiplies every new matrix in. Such
    suffix products need no inverse; prefix products would, and their determinant, μ^steps, soon is 0. Products reach
    back to the row that has waited longest.

    Args:
        rows: of the parameter; all are current.
        device: of the parameter.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._last = torch.zeros(rows, dtype=torch.int32, device=device)  # [rows] the last step applied to each
        self._first = 0  # the step after which the oldest product starts
        # [steps kept + 1, 2, 2] float64, on the host: the products of all steps after step `_first + i`
        self._products = _identity()
        self._prune_at = 64
        self._total = 0  # steps ever recorded
        #: Momentum buffer of the recorded steps, which decays with the weight; None without momentum or if all rows
        #: are current.
        self.velocity: Tensor | None = None

    @property
    def steps_kept(self) -> int:
        """Past steps whose products are still needed."""
        return len(self._products) - 1

    def record_step(self, matrix: Tensor, updated: Tensor, velocity: Tensor | None) -> None:
        """Record a step that has updated some rows and is deferred for all others.

        Args:
            matrix: [2, 2] float64 on the host, the effect on (weight, velocity) of a row without a gradient.
            updated: [n] int64, the rows that have had the step.
            velocity: the momentum buffer, of the parameter's shape; None without momentum.
        """
        self._total += 1
        self._products = torch.cat((matrix @ self._products, _identity()))
        self.velocity = velocity
        if len(self._products) >= self._prune_at:
            self._prune()
        if len(updated) == len(self._last):
            self._mark_all_current()
        else:
            self._last.index_fill_(0, updated, self._now)

    def apply(self, parameter: Tensor, rows: Tensor | None = None) -> None:
        """Apply the deferred steps to ``rows`` [n] int64 of ``parameter``; None: to all rows."""
        if not self.steps_kept:
            return
        outdated = torch.arange(len(parameter), device=parameter.device) if rows is None else rows
        if parameter.device.type == "cpu":  # elsewhere, looking would mean waiting for the device
            outdated = outdated[self._last[outdated] < self._now]
        # `.data`: a backward that is still to come may hold the parameter, but not these rows of it.
        stored = {"weight": parameter.data}
        if self.velocity is not None:
            stored["velocity"] = self.velocity
        work = WorkingRows(stored, stream_key(RandomStream.DEFERRED_DECAY, self._total))
        all_products = send(self._products, parameter.device)
        piece = rows_per_piece(parameter)
        for start in range(0, len(outdated), piece):
            some = outdated[start : start + piece]
            products = all_products[(self._last[some] - self._first).long()]
            copies = work.read(some)
            _multiply(products, copies)
            work.write(some, copies)
            self._last.index_fill_(0, some, self._now)
        if rows is None:
            self._mark_all_current()

    @property
    def _now(self) -> int:
        return self._first + self.steps_kept

    def _mark_all_current(self) -> None:
        self._last.zero_()
        self._first, self._products, self.velocity = 0, self._products[-1:].clone(), None

    def _prune(self) -> None:
        """Drop products that no row needs any more. Walks all rows, so it runs only when the products have doubled."""
        oldest = int(self._last.min()) if len(self._last) else self._now
        self._products = self._products[oldest - self._first :].clone()
        # Count from 0 again: 32 bits then hold any run's steps.
        self._last -= oldest
        self._first = 0
        self._prune_at = max(64, 2 * len(self._products))


# Weak keys, compared by identity; a record does not refer to its parameter, so both are freed together.
_by_parameter = WeakTensorKeyDictionary()


def deferred_decay_of(parameter: Tensor) -> DeferredDecay | None:
    """Return the record of ``parameter``; None if no optimizer has deferred anything."""
    record: DeferredDecay | None = _by_parameter.get(parameter)
    return record


def start_deferred_decay(parameter: Tensor) -> DeferredDecay:
    """Return the record of ``parameter``, a new one if there is none."""
    record = deferred_decay_of(parameter)
    if record is None:
        record = _by_parameter[parameter] = DeferredDecay(len(parameter), parameter.device)
    return record


@torch.no_grad()
def apply_deferred_decay(parameter: Tensor | None, rows: Tensor | None = None) -> None:
    """Bring ``rows`` [n] int64 of ``parameter`` up to date, all by default; does nothing where nothing is deferred."""
    record = None if parameter is None else deferred_decay_of(parameter)
    if record is not None and parameter is not None:
        record.apply(parameter, rows)


@torch.no_grad()
def settle_deferred_decay(parameter: Tensor) -> None:
    """Bring all rows of ``parameter`` up to date and drop its record."""
    apply_deferred_decay(parameter)
    _by_parameter.pop(parameter, None)


def _identity() -> Tensor:
    return torch.eye(2, dtype=torch.float64, device="cpu")[None]


def _multiply(products: Tensor, copies: dict[str, Tensor]) -> None:
    """Multiply each row's (weight, velocity) by its matrix of ``products [n, 2, 2]``, in place."""
    weight, velocity = copies["weight"], copies.get("velocity")
    factors = products.to(weight.dtype).view(len(weight), 4, *[1] * (weight.dim() - 1))
    if velocity is None:
        weight.mul_(factors[:, 0])
        return
    velocity_after = velocity * factors[:, 3] + weight * factors[:, 2]
    weight.mul_(factors[:, 0]).add_(velocity * factors[:, 1])
    velocity.copy_(velocity_after)
