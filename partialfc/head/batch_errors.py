"""Checks of a batch, and the errors that they raise on every rank.

A problem travels in the header of the rank that finds it: a code and two numbers, from which all form one message.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from partialfc.errors import BatchMismatch, LabelOutOfRange, NonFiniteEmbeddings, PartialFCError
from partialfc.head.message import FLAG_BACKWARD, FLAG_TRAINING, FLOATS, BatchFormat, Field, dtype_code, dtype_of


class Problem(IntEnum):
    """Faults of one rank's batch, with the details a and b that their messages print."""

    NONE = 0
    NOT_2D = 1  # a = dimensions of the embeddings
    NOT_FLOAT = 2
    WRONG_DIM = 3
    LABELS_SHAPE = 4  # a = number of labels, b = their dimensions
    LABELS_DTYPE = 5  # a = dtype of the labels
    WRONG_DEVICE = 6
    TOO_LARGE = 7
    DTYPE_CHANGED = 8
    LABEL_RANGE = 9  # a = sample, b = its label
    NON_FINITE = 10  # a = first such sample, b = their number


class Finding(NamedTuple):
    """A problem and its details, as a header holds them."""

    problem: Problem = Problem.NONE
    a: int = 0
    b: int = 0


def check_form(
    embeddings: Tensor, labels: Tensor, dim: int, device: torch.device, agreed: BatchFormat | None
) -> Finding:
    """Check the form of a local batch: everything that the host knows without reading values."""
    if embeddings.dim() != 2:
        return Finding(Problem.NOT_2D, embeddings.dim())
    if embeddings.dtype not in FLOATS:
        return Finding(Problem.NOT_FLOAT)
    if embeddings.shape[1] != dim:
        return Finding(Problem.WRONG_DIM)
    if labels.dim() != 1 or len(labels) != len(embeddings):
        return Finding(Problem.LABELS_SHAPE, labels.numel(), labels.dim())
    if labels.dtype != torch.int64:
        return Finding(Problem.LABELS_DTYPE, dtype_code(labels.dtype))
    if embeddings.device.type != device.type or labels.device.type != device.type:
        return Finding(Problem.WRONG_DEVICE)
    if agreed is not None and len(embeddings) > agreed.capacity:
        return Finding(Problem.TOO_LARGE)
    if agreed is not None and embeddings.dtype != agreed.dtype:
        return Finding(Problem.DTYPE_CHANGED)
    return Finding()


def check_values(header: Tensor, embeddings: Tensor, labels: Tensor, num_classes: int, check_finite: bool) -> None:
    """Write a label out of range, or a non-finite embedding, into ``header``; never waits for the device."""
    if not len(labels):
        return
    outside = (labels < -1) | (labels >= num_classes)
    sample = outside.int().argmax()
    label_finding = torch.stack((torch.full_like(sample, Problem.LABEL_RANGE), sample, labels.take(sample)))
    found = header[Field.PROBLEM :]
    found.copy_(torch.where(outside.any(), label_finding, found))
    if check_finite:
        broken = ~torch.isfinite(embeddings).all(dim=1) & (labels != -1)
        sample = broken.int().argmax()
        finding = torch.stack((torch.full_like(sample, Problem.NON_FINITE), sample, broken.sum()))
        found.copy_(torch.where(broken.any() & (found[0] == Problem.NONE), finding, found))


def any_problem(headers: Tensor) -> Tensor:
    """Return a bool [] on the device of ``headers [W, 9]``: True if a rank reports a problem or the ranks disagree."""
    shared = headers[:, Field.FLAGS : Field.RATE + 1]
    return (headers[:, Field.PROBLEM] != Problem.NONE).any() | (shared != shared[0]).any()


def raise_problem(headers: list[list[int]], num_classes: int, dim: int, agreed: BatchFormat | None) -> None:
    """Raise the problem that the gathered ``headers`` report, if any, with the same message on every rank.

    Raises:
        BatchMismatch, LabelOutOfRange, NonFiniteEmbeddings
    """
    failing = [rank for rank, header in enumerate(headers) if header[Field.PROBLEM] != Problem.NONE]
    if failing:
        error, text = _describe(headers[failing[0]], num_classes, dim, agreed)
        others = f" (ranks {', '.join(map(str, failing[1:]))} report problems too)" if failing[1:] else ""
        raise error(f"rank {failing[0]}: {text}{others}")
    shared: dict[str, list[object]] = {
        "the step": [header[Field.STEP] for header in headers],
        "the mode": [_mode(header[Field.FLAGS]) for header in headers],
        "the sample rate": [header[Field.RATE] * 2.0**-53 for header in headers],
    }
    for name, values in shared.items():
        if len(set(values)) > 1:
            differing = next(rank for rank, value in enumerate(values) if value != values[0])
            raise BatchMismatch(
                f"ranks disagree about {name}: rank 0 has {values[0]}, rank {differing} has {values[differing]}; "
                "call the head in the same way on every rank"
            )


def _mode(flags: int) -> str:
    mode = "training" if flags & FLAG_TRAINING else "evaluation"
    return f"{mode} {'with' if flags & FLAG_BACKWARD else 'without'} gradients"


def _describe(
    header: list[int], num_classes: int, dim: int, agreed: BatchFormat | None
) -> tuple[type[PartialFCError], str]:
    """Return the error that a header reports, and its message."""
    count, dtype, a, b = (header[field] for field in (Field.COUNT, Field.DTYPE, Field.DETAIL_A, Field.DETAIL_B))
    match Problem(header[Field.PROBLEM]):
        case Problem.NOT_2D:
            found = f"a tensor of {a} dimensions" if a else "a number, or no tensor"
            text = f"embeddings must be [batch, {dim}], got {found}"
        case Problem.NOT_FLOAT:
            text = f"embeddings must be float32, float64, float16 or bfloat16, got {_dtype_name(dtype)}"
        case Problem.WRONG_DIM:
            text = f"embeddings must be [batch, {dim}], got [{count}, {header[Field.DIM]}]"
        case Problem.LABELS_SHAPE:
            text = f"labels must be [{count}], one for each embedding, got {a} labels in {b} dimensions"
        case Problem.LABELS_DTYPE:
            text = f"labels must be int64, got {_dtype_name(a)}; use labels.long()"
        case Problem.WRONG_DEVICE:
            text = "embeddings and labels must be on the device of the head's weight"
        case Problem.TOO_LARGE:
            text = (
                f"a batch of {count} samples exceeds the {agreed.capacity if agreed else 0} agreed at the first call; "
                "pass the largest batch first, or call head.reset_batch_format() on every rank"
            )
        case Problem.DTYPE_CHANGED:
            text = (
                f"embeddings are {_dtype_name(dtype)}, but {agreed.dtype if agreed else ''} was agreed at the first "
                "call; convert them, or call head.reset_batch_format() on every rank"
            )
        case Problem.LABEL_RANGE:
            text = f"label {b} (sample {a} of its batch) is outside [0, {num_classes}); use -1 to ignore a sample"
            return LabelOutOfRange, text
        case Problem.NON_FINITE:
            text = (
                f"{b} of {count} embeddings hold NaN or Inf, the first at sample {a} of its batch; check the learning "
                "rate, the loss scale and the input of that sample"
            )
            return NonFiniteEmbeddings, text
        case Problem.NONE:
            raise AssertionError("this header reports no problem")
    return BatchMismatch, text


def _dtype_name(code: int) -> str:
    return str(dtype_of(code) or "another dtype")
