"""The subclasses of docs/losses.md compute what published code computes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from partialfc import PartialFC, RowSGD
from partialfc.losses.base import Loss, Samples

S = 64.0
COSINES = torch.linspace(-0.99, 0.99, 41, dtype=torch.float64)
LENGTHS = torch.linspace(1.0, 300.0, 41, dtype=torch.float64)


def made(name: str, **settings: Any) -> Any:
    text = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"class {name}" in code]
    names: dict[str, Any] = {"__name__": "variants"}
    exec(compile(block, "docs/losses.md", "exec"), names)
    return names[name](**settings)


def target_logits(loss: Loss) -> Tensor:
    everything = torch.ones(len(COSINES), dtype=torch.bool)
    samples = Samples(LENGTHS, everything, everything.long(), 0, 0, target_cosine=COSINES, state=loss.state)
    return loss.target_logit(COSINES, samples)


def easy_magface(loss: Any) -> Tensor:
    margin = 0.45 + (0.8 - 0.45) / (110 - 10) * (LENGTHS.clamp(10, 110) - 10)
    shifted = COSINES * margin.cos() - (1 - COSINES**2).sqrt() * margin.sin()
    return S * torch.where(COSINES > 0, shifted, COSINES)


def easy_mv_am_softmax(loss: Any) -> Tensor:
    return S * torch.where(COSINES > 0.35, COSINES - 0.35, COSINES)


def clipped_adaface(loss: Any) -> Tensor:
    quality = (0.333 * (LENGTHS.clip(0.001, 100) - 20.0) / (100.0 + 1e-3)).clip(-1, 1)
    shifted = (COSINES.acos() - 0.4 * quality).clip(0, math.pi)
    return S * (shifted.cos() - (0.4 + 0.4 * quality))


def clamped_uce(loss: Any) -> Tensor:
    return (S * (COSINES - 0.4) - 12.0).clamp(-S, S)


VARIANTS: dict[str, Any] = {
    "EasyMagFace": (easy_magface, {}),
    "EasyMVAMSoftmax": (easy_mv_am_softmax, {}),
    "ClippedAdaFace": (clipped_adaface, {}),
    "ClampedUCE": (clamped_uce, {"bias": 12.0}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_the_logits_of_published_code(name: str) -> None:
    published, settings = VARIANTS[name]
    loss = made(name, **settings)
    torch.testing.assert_close(target_logits(loss).detach(), published(loss), rtol=1e-7, atol=1e-7)
    plain = type(loss).__bases__[0](**settings)
    assert not torch.allclose(target_logits(plain), target_logits(loss)), "it is a variant"
    x = (100.0 * torch.randn(8, 6)).requires_grad_()
    head = PartialFC(20, 6, loss)
    head(x, torch.arange(8)).loss.backward()
    RowSGD(head.parameters()).step()
    assert bool(x.grad.isfinite().all())


def test_the_variant_of_adaface_follows_clipped_lengths() -> None:
    loss = made("ClippedAdaFace")
    head = PartialFC(20, 6, loss)
    x = torch.nn.functional.normalize(torch.randn(4, 6)) * torch.tensor([[50.0], [80.0], [150.0], [300.0]])
    head(x.requires_grad_(), torch.arange(4)).loss.backward()
    RowSGD(head.parameters()).step()
    lengths = torch.tensor([50.0, 80.0, 100.0, 100.0])
    assert loss.mean == pytest.approx(0.99 * 20 + 0.01 * float(lengths.mean()), rel=1e-6)
    assert loss.std == pytest.approx(0.99 * 100 + 0.01 * float(lengths.std()), rel=1e-6)
