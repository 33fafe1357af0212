"""Losses that other libraries compute, too: the same values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from partialfc import losses
from tests.harness.single_loss import CLASSES, DIM, batch, head_of


def in_pytorch_metric_learning(name: str) -> tuple[losses.Loss, Any]:
    """Our loss and theirs."""
    theirs = pytest.importorskip(
        "pytorch_metric_learning.losses", reason="not installed: pytorch-metric-learning; pip install '.[dev]'"
    )
    sizes = {"num_classes": CLASSES, "embedding_size": DIM}
    return {
        "ArcFace": lambda: (losses.ArcFace(30, 0.4), theirs.ArcFaceLoss(**sizes, margin=math.degrees(0.4), scale=30)),
        "CosFace": lambda: (losses.CosFace(30, 0.3), theirs.CosFaceLoss(**sizes, margin=0.3, scale=30)),
        "SphereFace": lambda: (
            losses.ASoftmax(30, 3, annealing_start=0.0, annealing_end=0.0),
            theirs.SphereFaceLoss(**sizes, margin=3, scale=30),
        ),
        "SubCenterArcFace": lambda: (
            losses.SubCenterArcFace(30, 0.4, sub_centers=3),
            theirs.SubCenterArcFaceLoss(**sizes, margin=math.degrees(0.4), scale=30, sub_centers=3),
        ),
        "NormalizedSoftmax": lambda: (
            losses.NormFace(20),
            theirs.NormalizedSoftmaxLoss(**sizes, temperature=1 / 20),
        ),
    }[name]()


@pytest.mark.parametrize("name", ["ArcFace", "CosFace", "SphereFace", "SubCenterArcFace", "NormalizedSoftmax"])
def test_pytorch_metric_learning_computes_the_same(name: str) -> None:
    ours, theirs = in_pytorch_metric_learning(name)
    head, (x, y) = head_of(ours), batch()
    # Their SphereFace multiplies by the embeddings' lengths; with length 1 it is ours, but along the embedding itself.
    x = normalize(x.detach()).requires_grad_()
    rows = head.weight.detach().reshape(-1, DIM)
    theirs.W = torch.nn.Parameter(rows.T.clone())
    expected = theirs(x, y)
    (their_x, their_w) = torch.autograd.grad(expected, (x, theirs.W))
    out = head(x, y)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(head.weight.grad.to_dense().reshape(-1, DIM), their_w.T, rtol=1e-7, atol=1e-9)
    radial = (their_x * x.detach()).sum(1, keepdim=True) * x.detach()
    torch.testing.assert_close(x.grad, their_x - radial, rtol=1e-7, atol=1e-9)


def test_straight_through_margin_gradient_is_that_of_training_under_no_grad() -> None:
    x, y = batch()
    head = head_of(losses.ArcFace(margin_gradient="straight_through"))
    head(x, y).loss.backward()
    theirs = x.detach().clone().requires_grad_()
    cosine = normalize(theirs) @ normalize(head.weight.detach()).T
    with torch.no_grad():  # the widely copied code: logits changed in place, invisible to autograd
        own = cosine[range(len(y)), y]
        cosine[range(len(y)), y] = torch.cos(torch.acos(own) + 0.5)
    cross_entropy(64 * cosine, y).backward()
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_label_smoothing_is_that_of_torch_cross_entropy(bias: bool) -> None:
    x, y = batch()
    head = head_of(losses.LabelSmoothing(losses.Softmax(bias=bias), 0.15))
    theirs = x.detach().clone().requires_grad_()
    expected = cross_entropy(theirs @ head.weight.detach().T, y, label_smoothing=0.15)
    expected.backward()
    out = head(x, y)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected.detach())
    torch.testing.assert_close(x.grad, theirs.grad)
