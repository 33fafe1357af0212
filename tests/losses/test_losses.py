"""Properties of every loss by itself: its curve, its limits, its random margins, its wrappers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from partialfc import PartialFC, losses
from partialfc.head.random import normal_rows, stream_key
from tests.harness.loss_cases import LOSSES, make_loss
from tests.harness.single_loss import CLASSES, COSINES, DIM, batch, curve, describe, head_of

scales = st.floats(0.1, 512)
angles, units = st.floats(0, math.pi / 2), st.floats(0, 1)
EVERY_MARGIN = st.one_of(
    st.builds(losses.NormFace, scales),
    st.builds(losses.Softmax),
    st.builds(losses.CosFace, scales, st.floats(0, 2)),
    st.builds(losses.ArcFace, scales, angles),
    st.builds(losses.CombinedMargin, scales, st.floats(1, 8), angles, st.floats(0, 2)),
    st.builds(losses.SphereFace, scales, st.floats(1, 8)),
    st.builds(losses.ASoftmax, scales, st.integers(1, 8), st.just(0.0), st.just(0.0)),
    st.builds(losses.ASoftmax, scales, st.integers(1, 8)),
    st.builds(losses.SubCenterArcFace, scales, angles, st.integers(1, 5)),
    st.builds(losses.CurricularFace, scales, angles),
    st.builds(losses.MVAMSoftmax, scales, st.floats(0, 2), st.floats(1, 2)),
    st.builds(lambda s, low, more: losses.MagFace(s, low, low + more * (math.pi / 2 - low)), scales, angles, units),
    st.builds(losses.AdaFace, scales, units),
    st.builds(losses.ElasticArcFace, scales, angles, units),
    st.builds(losses.ElasticCosFace, scales, st.floats(0, 2), units),
    st.builds(losses.Circle, scales, units),
    st.builds(losses.UCE, scales, st.floats(0, 2), bias=st.floats(-20, 20)),
)


@settings(max_examples=300, deadline=None)
@given(loss=EVERY_MARGIN, norm=st.floats(1e-6, 1e4), noise=st.floats(-3, 3), wrapped=st.booleans())
def test_the_target_logit_is_monotone_in_the_target_cosine(
    loss: losses.Loss, norm: float, noise: float, wrapped: bool
) -> None:
    if wrapped and loss.is_cross_entropy:
        loss = losses.Focal(loss)
    samples = describe(len(COSINES), norm)
    logit, slope = curve(loss, replace(samples, noise=torch.full_like(COSINES, noise)))
    tolerance = 1e-12 * max(1.0, float(logit.abs().max()))
    assert bool((logit.diff() >= -tolerance).all()), "it falls somewhere"
    assert bool(torch.isfinite(slope).all())
    assert bool((slope >= -tolerance).all()), "the derivative has the wrong sign somewhere"
    assert float(logit[-1]) > float(logit[0])


@settings(max_examples=200, deadline=None)
@given(loss=EVERY_MARGIN, norm=st.floats(1e-6, 1e4), noise=st.floats(-3, 3))
def test_slopes_are_the_curves_own(loss: losses.Loss, norm: float, noise: float) -> None:
    samples = replace(describe(len(COSINES), norm), noise=torch.full_like(COSINES, noise))
    logit, slope = curve(loss, samples)
    if isinstance(loss, losses.Circle):  # its bracket is a weight, not differentiated
        assert torch.allclose(slope, loss.scale * (1 + loss.margin - COSINES))
        return
    step = 1e-7
    above, _ = curve(loss, samples, COSINES + step)
    below, _ = curve(loss, samples, COSINES - step)
    numeric, one_sided = (above - below) / (2 * step), (above - logit) / step
    smooth = (numeric - one_sided).abs() <= 1e-3 * (1 + numeric.abs())  # away from kinks
    smooth[0] = smooth[-1] = False  # at the ends the derivative is bounded
    assert int(smooth.sum()) > 0.9 * len(COSINES)
    torch.testing.assert_close(slope[smooth], numeric[smooth], rtol=1e-4, atol=1e-4 * loss.scale)


WITHOUT_MARGIN: list[losses.Loss] = [
    losses.CosFace(32, margin=0.0),
    losses.ArcFace(32, margin=0.0),
    losses.CombinedMargin(32, m1=1.0, m2=0.0, m3=0.0),
    losses.SphereFace(32, margin=1.0),
    losses.ASoftmax(32, margin=1),
    losses.ASoftmax(32, margin=1, annealing_start=0.0, annealing_end=0.0),
    losses.SubCenterArcFace(32, margin=0.0, sub_centers=1),
    losses.SubCenter(losses.NormFace(32), sub_centers=1),
    losses.MVAMSoftmax(32, margin=0.0, emphasis=1.0),
    losses.MagFace(32, margin_low=0.0, margin_high=0.0, penalty_weight=0.0),
    losses.AdaFace(32, margin=0.0),
    losses.ElasticArcFace(32, margin=0.0, std=0.0),
    losses.ElasticCosFace(32, margin=0.0, std=0.0, plus=True),
    losses.Focal(losses.NormFace(32), gamma=0.0),
    losses.LabelSmoothing(losses.NormFace(32), smoothing=0.0),
]


@pytest.mark.parametrize("loss", WITHOUT_MARGIN, ids=lambda loss: repr(loss).replace("\n", ""))
def test_margin_zero_gives_normface(loss: losses.Loss) -> None:
    found = {}
    for which in (loss, losses.NormFace(32)):
        head, (x, y) = head_of(which), batch()
        out = head(x, y)
        out.loss.backward()
        found[which] = (out.loss.detach(), x.grad, head.weight.grad.to_dense().flatten(1))
    for value, expected in zip(*found.values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 64.0, 512.0])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_finite_up_to_the_ends_and_scale_512(
    name: str, scale: float, dtype: torch.dtype
) -> None:
    spec = _with_scale(LOSSES[name], scale)
    head = PartialFC(CLASSES, DIM, make_loss(spec), weight_dtype=dtype)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(3))
        head.weight[5] = -head.weight[4]
        head.weight[7] = head.weight[6]
    own = head.weight.detach().flatten(1)[:, :DIM]
    rows = torch.tensor([4, 4, 5, 6, 6, 7, 0, 1])
    labels = torch.tensor([4, 5, 4, 6, 7, 2, -1, 0])  # cosines of 1, −1, −1, 1, 1 …
    x = (own[rows] * torch.tensor([1.0, 1, 3, 1e-3, 1e3, 1, 1, 1], dtype=dtype)[:, None]).clone().requires_grad_()
    out = head(x, labels)
    out.loss.backward()
    assert bool(torch.isfinite(out.loss))
    assert bool(torch.isfinite(x.grad).all())
    assert bool(torch.isfinite(head.weight.grad.to_dense()).all())
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in head.loss.parameters())


def _with_scale(spec: dict[str, Any], scale: float) -> dict[str, Any]:
    if "loss" in spec:
        return {**spec, "loss": _with_scale(spec["loss"], scale)}
    return spec if spec["name"] == "softmax" else {**spec, "scale": scale}


def test_elastic_margins_are_normal_and_a_function_of_seed_step_and_position() -> None:
    positions = torch.arange(20_000)
    draws = torch.empty(20_000, 1)
    normal_rows(stream_key(1, 3, 5), positions, 1, 1.0, draws)
    samples = describe(20_000, noise=draws[:, 0].double())
    loss = losses.ElasticCosFace(1.0, margin=0.35, std=0.02)
    margins = -curve(loss, samples, torch.zeros(20_000, dtype=torch.float64))[0]
    assert float(margins.mean()) == pytest.approx(0.35, abs=5 * 0.02 / 20_000**0.5)
    assert float(margins.std()) == pytest.approx(0.02, rel=0.03)
    x, y = batch()
    values = [float(head_of(losses.ElasticArcFace(std=0.3), seed=seed)(x, y, step=step).loss) for seed, step in SEEDS]
    assert values[0] == values[1], "the same seed and step"
    assert len({*values}) == 3, "another step, another seed"


SEEDS = [(0, 0), (0, 0), (0, 1), (1, 0)]


def test_the_plus_form_gives_the_largest_margin_to_the_hardest_sample() -> None:
    cosine = torch.tensor([0.9, 0.1, 0.5, -0.3, 0.7], dtype=torch.float64)
    noise = torch.tensor([0.0, 1.0, -1.0, 3.0, 2.0], dtype=torch.float64)
    valid = torch.tensor([True, True, True, False, True])
    samples = describe(5, noise=noise, valid=valid)
    loss = losses.ElasticCosFace(1.0, margin=0.5, std=0.1, plus=True)
    margins = cosine - loss.target_logit(cosine, samples)
    # The draws of the valid samples are 0.5, 0.6, 0.4, 0.7; the hardest of them has cosine 0.1.
    assert margins[valid].tolist() == pytest.approx([0.4, 0.7, 0.6, 0.5])


def test_numbers_of_numpy_are_numbers() -> None:
    import numpy as np

    assert losses.ArcFace(np.float32(32), np.float64(0.3)).scale == 32.0


def test_slopes_at_the_ends_are_those_of_normface_without_a_margin() -> None:
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    for loss in (losses.ArcFace(8.0, margin=0.0), losses.MagFace(8.0, 0.0, 0.0), losses.ElasticArcFace(8.0, 0.0, 0.0)):
        assert curve(loss, describe(2), ends)[1].tolist() == [8.0, 8.0]


def test_focal_without_gamma_is_the_loss_itself_also_without_negatives() -> None:
    x, y = batch()
    for options in ({"filter_threshold": -1.0}, {}):
        plain, focal = (head_of(loss, **options) for loss in (losses.ArcFace(), losses.Focal(losses.ArcFace(), 0.0)))
        assert torch.equal(plain(x, y).loss, focal(x, y).loss)


def test_a_wrapper_may_change_the_negatives() -> None:
    class Harder(losses.Wrapper):
        def negative_logits(self, cosine: Tensor, samples: losses.Samples) -> Tensor:
            return super().negative_logits(cosine, samples) + 0.3

    x, y = batch()
    plain = head_of(losses.CosFace(10.0, 0.0))
    head = head_of(Harder(losses.CosFace(10.0, 0.0)))
    logits = 10 * normalize(x.detach()) @ normalize(plain.weight.detach()).T
    own = torch.nn.functional.one_hot(y, CLASSES).bool()
    expected = cross_entropy(torch.where(own, logits, logits + 0.3), y)
    torch.testing.assert_close(head(x, y).loss.detach(), expected)


def test_a_loss_on_raw_logits_may_have_a_scale() -> None:
    class Tempered(losses.Loss):
        needs = frozenset({"raw_logits"})

    x, y = batch()
    head = head_of(Tempered(scale=40.0))
    theirs = x.detach().clone().requires_grad_()
    with torch.no_grad():
        head.weight.mul_(30)
    expected = cross_entropy(40 * theirs @ head.weight.detach().T, y)
    expected.backward()
    out = head(x, y)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected.detach())
    torch.testing.assert_close(x.grad, theirs.grad)


def test_moving_averages_stay_in_float64() -> None:
    head = head_of(losses.AdaFace())
    with torch.no_grad():
        head.loss.state.copy_(torch.tensor([20.123456789012, 99.9]))
    before = head.loss.state.clone()
    for convert in (head.bfloat16, head.float, lambda: head.to(torch.bfloat16)):
        assert torch.equal(convert().loss.state, before)
