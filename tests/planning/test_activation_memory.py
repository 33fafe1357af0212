"""Peak memory of activations, as planned and with real numbers."""

from __future__ import annotations

import pytest
import torch

from partialfc import models
from partialfc.planning.activation_memory import peak_activation_bytes


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_peak_under_autocast_is_nearly_the_same_with_real_numbers(weights: torch.dtype) -> None:
    peaks = []
    for fake in (True, False):
        backbone = models.build("vit_t", 64, 3, 27, {"depth": 2, "width": 64, "heads": 2}, True)
        peaks.append(peak_activation_bytes(backbone, (3, 3, 27, 27), weights, torch.bfloat16, fake=fake))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.005), "copies of weights die a little sooner or later"


@pytest.mark.parametrize("again", [False, True])
def test_the_peak_activation_bytes_is_the_same_with_real_numbers(again: bool) -> None:
    peaks = []
    for fake in (True, False):
        backbone = (
            models.build("mobilefacenet", 64, 3, 32, None, False)
            if not again
            else models.build("vit_t", 64, 3, 27, {"depth": 2, "width": 64, "heads": 2}, True)
        )
        size = 27 if again else 32
        torch.manual_seed(0)
        peaks.append(peak_activation_bytes(backbone, (3, 3, size, size), fake=fake))
    assert peaks[0] == peaks[1] > 0
