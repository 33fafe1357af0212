"""Losses that are refused: wrong parameters, and classes that break the contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from partialfc import ConfigError, losses
from tests.harness.single_loss import head_of

REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: losses.NormFace(scale=0), "scale must be a positive number, got 0"),
    (lambda: losses.CosFace(scale=math.inf), "scale must be a positive number, got inf"),
    (lambda: losses.ArcFace(scale="64"), "scale must be a positive number, got 64"),
    (lambda: losses.ArcFace(margin=math.nan), r"margin must lie in \[0, 1.5708\], got nan"),
    (lambda: losses.SphereFace(margin=0.5), r"margin must lie in \[1, 8\], got 0.5"),
    (lambda: losses.ASoftmax(margin=0), r"margin must lie in \[1, 8\], got 0"),
    (lambda: losses.ASoftmax(margin=1.35), "whole number in .* SphereFace accepts fractions"),
    (lambda: losses.ASoftmax(annealing_start=1.0, annealing_end=5.0), r"annealing_start must lie in \[5, 1e\+09\]"),
    (lambda: losses.SubCenterArcFace(sub_centers=0), r"sub_centers must be a whole number in \[1, 256\], got 0"),
    (lambda: losses.SubCenter(losses.CosFace(), sub_centers=1.5), "sub_centers must be a whole number"),
    (lambda: losses.SubCenter(losses.Softmax()), "Softmax works on raw logits"),
    (lambda: losses.SubCenter(losses.SubCenterArcFace()), "has sub-centers already"),
    (lambda: losses.SubCenter("arcface"), "loss must be a partialfc.losses.Loss"),
    (lambda: losses.CurricularFace(momentum=1.5), r"momentum must lie in \[0, 1\], got 1.5"),
    (lambda: losses.MVAMSoftmax(emphasis=0.9), r"emphasis must lie in \[1, 2\], got 0.9"),
    (lambda: losses.MagFace(margin_low=0.8, margin_high=0.4), r"margin_high must lie in \[0.8, 1.5708\], got 0.4"),
    (lambda: losses.MagFace(norm_low=110, norm_high=10), "0 < norm_low < norm_high must hold, got 110 and 10"),
    (lambda: losses.MagFace(penalty_weight=-1), "penalty_weight must lie in"),
    (lambda: losses.AdaFace(margin=1.2), r"margin must lie in \[0, 1\], got 1.2"),
    (lambda: losses.AdaFace(concentration=0), "concentration must be a positive number, got 0"),
    (lambda: losses.ElasticArcFace(std=-0.1), r"std must lie in \[0, 1\], got -0.1"),
    (lambda: losses.Circle(margin=2), r"margin must lie in \[0, 1\], got 2"),
    (lambda: losses.UCE(negative_weight=0), "negative_weight must be a positive number, got 0"),
    (lambda: losses.UCE(bias=math.inf), r"bias must lie in \[-10000, 10000\], got inf"),
    (lambda: losses.UCE(bias="x"), "bias must lie in"),
    (lambda: losses.SubCenterArcFace(sub_centers=math.nan), "whole number in .* got nan"),
    (lambda: losses.SubCenterArcFace(sub_centers=257), "whole number in .* got 257"),
    (lambda: losses.MagFace(norm_low="a"), "norm_low must be a positive number, got a"),
    (lambda: losses.ArcFace(scale=True), "scale must be a positive number, got True"),
    (lambda: losses.LabelSmoothing(losses.Softmax(), "a"), "smoothing must lie in"),
    (lambda: losses.Focal(losses.ArcFace(), gamma=-1), r"gamma must lie in \[0, 10\], got -1"),
    (lambda: losses.Focal(losses.ArcFace(), alpha=0), "alpha must be a positive number, got 0"),
    (lambda: losses.Focal(losses.UCE()), "UCE has no p_y"),
    (lambda: losses.Focal(losses.Focal(losses.ArcFace())), "Focal has no p_y"),
    (lambda: losses.Focal(losses.LabelSmoothing(losses.ArcFace())), "LabelSmoothing has no p_y"),
    (lambda: losses.LabelSmoothing(losses.Circle()), "whose negatives are plain logits, got Circle"),
    (lambda: losses.LabelSmoothing(losses.UCE()), "got UCE"),
    (lambda: losses.LabelSmoothing(losses.Softmax(), smoothing=1.0), r"smoothing must lie in \[0, 0.99\], got 1.0"),
    (lambda: head_of(losses.ArcFace(), filter_threshold=1.5), r"in \[-1, 1\], got 1.5"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_wrong_parameters_are_refused_with_the_valid_range(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_loss_that_breaks_its_contract_is_refused_when_the_head_is_made() -> None:
    class Unknown(losses.NormFace):
        needs = frozenset({"labels"})

    class Mean(losses.NormFace):
        def target_logit(self, cosine: Tensor, samples: losses.Samples) -> Tensor:
            return cosine.mean()

    class Hidden(losses.NormFace):
        def __init__(self) -> None:
            super().__init__()
            self.power = torch.nn.Parameter(torch.ones(()))

        def negative_logits(self, cosine: Tensor, samples: losses.Samples) -> Tensor:
            return self.scale * cosine * self.power

    class Forgetful(losses.NormFace):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.zeros(1))

    class FromNorms(losses.NormFace):
        needs = frozenset({"norms"})

        def negative_logits(self, cosine: Tensor, samples: losses.Samples) -> Tensor:
            return self.scale * cosine * (samples.norms / 10).to(cosine.dtype)[:, None]

    class Scalar(losses.NormFace):
        def sample_loss(self, d: Tensor) -> Tensor:
            return d.mean()

    class Undeclared(losses.NormFace):
        def target_logit(self, cosine: Tensor, samples: losses.Samples) -> Tensor:
            return self.scale * (cosine - samples.noise)

    with pytest.raises(TypeError):
        head_of(Undeclared())
    for kind, words in (
        (FromNorms, r"FromNorms.negative_logits depends on a parameter of the loss or on samples.norms"),
        (Scalar, r"Scalar.objective must keep the shape \[2\]"),
        (Unknown, r"Unknown.needs may hold .* got \['labels'\]"),
        (Mean, r"Mean.target_logit must keep the shape \[2\] of its input, got \[\]"),
        (Hidden, "Hidden.negative_logits depends on a parameter of the loss"),
        (Forgetful, r"Forgetful has a state but no statistics\(\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            head_of(kind())


def test_a_loss_with_a_state_belongs_to_one_head() -> None:
    for loss in (losses.CurricularFace(), losses.Focal(losses.AdaFace()), losses.UCE()):
        head = head_of(loss)
        with pytest.raises(ConfigError, match="already belongs to a head; give each head its own"):
            head_of(loss)
        assert head.loss is loss
    shared = losses.ArcFace()
    assert head_of(shared).loss is head_of(shared).loss, "nothing in it to disturb"
