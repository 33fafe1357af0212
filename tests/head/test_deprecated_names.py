"""Documented names that were renamed keep working, with a warning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from partialfc import PartialFC, RowSGD, losses
from tests.harness.rows import CLASSES, DIM, small_batch, small_head


def _decayed() -> tuple[PartialFC, RowSGD]:
    """A head some of whose rows have decay deferred."""
    head = small_head(sample_rate=0.2)
    optimizer = RowSGD(head.parameters(), lr=0.5, weight_decay=0.1, unsampled_rows="decayed")
    for seed in range(3):
        head(*small_batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return head, optimizer


def test_head_catch_up_applies_deferred_decay() -> None:
    (old, _), (new, _) = _decayed(), _decayed()
    before = old.weight.detach().clone()
    with pytest.warns(DeprecationWarning, match=r"head.catch_up\(\) is now apply_deferred_decay\(\)"):
        old.catch_up()
    new.apply_deferred_decay()
    assert torch.equal(old.weight, new.weight)
    assert not torch.equal(old.weight, before)


def test_an_optimizers_catch_up_all_applies_deferred_decay() -> None:
    (old_head, old), (new_head, new) = _decayed(), _decayed()
    with pytest.warns(DeprecationWarning, match=r"catch_up_all\(\) is now apply_deferred_decay\(\)"):
        old.catch_up_all()
    new.apply_deferred_decay()
    assert torch.equal(old_head.weight, new_head.weight)


class Discounting(losses.NormFace):
    """A custom loss that reads ``samples.counted``."""

    def penalty(self, samples: losses.Samples) -> Tensor:
        return samples.counted.double()


def test_a_custom_loss_may_read_samples_counted() -> None:
    with pytest.warns(DeprecationWarning, match="samples.counted is now samples.valid"):
        head = PartialFC(CLASSES, DIM, Discounting(16.0), weight_dtype=torch.float64)
    plain = PartialFC(CLASSES, DIM, losses.NormFace(16.0), weight_dtype=torch.float64)
    x, y = small_batch()
    y[3] = -1
    with pytest.warns(DeprecationWarning, match=r"samples\.valid"):
        found = head(x, y).loss
    torch.testing.assert_close(found, plain(x, y).loss + 1)
