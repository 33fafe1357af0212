"""What steps without a gradient have done to rows that nobody has looked at since.

With zero gradient a step of SGD is linear in a row's weight and velocity, and the same for all rows: a 2×2 matrix. So a
row only has to remember the step it was last brought up to; the product of the matrices since then does the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PendingDecay:
    """The steps that the rows of a parameter still owe.

    For each past step it keeps the product of the matrices of all steps after it, and multiplies every new matrix in:
    such suffix products need no inverse. (Prefix products would: their determinant, μ^steps, soon is 0.) It keeps them
    back to the row that has waited longest.

    Args:
        rows: of the parameter; all are up to date now.
        device: of the parameter.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._last = torch.zeros(rows, dtype=torch.int32, device=device)  # the step each row was brought up to
        self._first = 0  # the step that the oldest product starts after
        self._products = _identity(1, device)  # [steps kept + 1, 2, 2] float64: of all steps after step `_first + i`
        self._shrink_at = 64
        self.total = 0  # steps ever

    @property
    def _now(self) -> int:
        return self._first + len(self._products) - 1

    def is_empty(self) -> bool:
        """Whether no step has passed since all rows were brought up to date."""
        return len(self._products) == 1

    def add_step(self, matrix: Tensor) -> None:
        """A step that does ``matrix [2, 2]`` float64 to (weight, velocity) of a row without a gradient."""
        self.total += 1
        matrix = matrix.to(self._products.device)
        self._products = torch.cat((matrix @ self._products, _identity(1, self._products.device)))
        if len(self._products) >= self._shrink_at:
            self._forget()

    def take(self, rows: Tensor | slice) -> Tensor:
        """The products [n, 2, 2] float64 that ``rows`` owe; they count as up to date from now on."""
        owed = self._products[(self._last[rows] - self._first).long()]
        self._last[rows] = self._now
        return owed

    def behind(self, rows: Tensor) -> Tensor:
        """Those of ``rows [n]`` that owe at least one step."""
        return rows[self._last[rows] < self._now]

    def settle(self) -> None:
        """Forget all steps: every row has been brought up to date."""
        self._last.zero_()
        self._first, self._products = 0, self._products[-1:].clone()

    def _forget(self) -> None:
        """Drop what no row owes any more. Looks at all rows, so it runs once the products have doubled."""
        oldest = int(self._last.min()) if len(self._last) else self._now
        self._products = self._products[oldest - self._first :].clone()
        # Count from 0 again: 32 bits then hold any run's steps.
        self._last -= oldest
        self._first = 0
        self._shrink_at = max(64, 2 * len(self._products))


def _identity(count: int, device: torch.device) -> Tensor:
    return torch.eye(2, dtype=torch.float64, device=device).expand(count, 2, 2).clone()
