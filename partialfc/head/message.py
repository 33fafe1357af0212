"""One rank's share of the batch as one message: header, labels, embeddings.

The buffer has the same size on every rank and in every step, so one all-gather moves everything, and an error found on
one rank travels with the batch: all ranks read the same headers and raise the same exception.

Layout (bytes): 9 int64 of header | capacity int64 labels | capacity × dim embeddings | padding to 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NoReturn

import torch
from torch import Tensor

from partialfc.errors import BatchMismatch, LabelOutOfRange, NonFiniteEmbeddings, PartialFCError

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Position in this tuple is how a dtype travels in a header.
_DTYPES = (*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class Field(IntEnum):
    """Positions in a header."""

    COUNT = 0  # samples this rank passed
    DTYPE = 1  # of the embeddings
    DIM = 2  # of the embeddings
    FLAGS = 3  # see FLAG_*
    STEP = 4
    RATE = 5  # the sample rate, in units of 2^-53
    ERROR = 6  # a Problem
    DETAIL_A = 7
    DETAIL_B = 8


HEADER_FIELDS = len(Field)
FLAG_TRAINING, FLAG_BACKWARD = 1, 2


class Problem(IntEnum):
    """What can be wrong with one rank's batch; the details are what the messages below print."""

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
    NON_FINITE = 10  # a = first such sample, b = how many


@dataclass(frozen=True)
class BatchFormat:
    """What all ranks agreed on at the first call: the shape and dtype of the message."""

    capacity: int  # samples a rank
    dim: int
    dtype: torch.dtype  # of the embeddings

    @property
    def label_bytes(self) -> int:
        return self.capacity * 8

    @property
    def embedding_bytes(self) -> int:
        return self.capacity * self.dim * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return (HEADER_FIELDS * 8 + self.label_bytes + self.embedding_bytes + 7) // 8 * 8


def dtype_code(dtype: torch.dtype) -> int:
    """How ``dtype`` travels in a header; -1 for one that embeddings and labels cannot have."""
    return _DTYPES.index(dtype) if dtype in _DTYPES else -1


def dtype_of(code: int) -> torch.dtype:
    """The dtype that :func:`dtype_code` gave ``code`` for."""
    return _DTYPES[code]


def find_problem(
    embeddings: Tensor, labels: Tensor, dim: int, device: torch.device, agreed: BatchFormat | None
) -> tuple[Problem, int, int]:
    """Check everything about a local batch that the host knows without looking at values."""
    if embeddings.dim() != 2:
        return Problem.NOT_2D, embeddings.dim(), 0
    if embeddings.dtype not in _FLOATS:
        return Problem.NOT_FLOAT, 0, 0
    if embeddings.shape[1] != dim:
        return Problem.WRONG_DIM, 0, 0
    if labels.dim() != 1 or len(labels) != len(embeddings):
        return Problem.LABELS_SHAPE, labels.numel(), labels.dim()
    if labels.dtype != torch.int64:
        return Problem.LABELS_DTYPE, dtype_code(labels.dtype), 0
    if embeddings.device.type != device.type or labels.device.type != device.type:
        return Problem.WRONG_DEVICE, 0, 0
    if agreed is not None and len(embeddings) > agreed.capacity:
        return Problem.TOO_LARGE, 0, 0
    if agreed is not None and embeddings.dtype != agreed.dtype:
        return Problem.DTYPE_CHANGED, dtype_code(agreed.dtype), 0
    return Problem.NONE, 0, 0


def make_header(
    embeddings: Tensor, problem: tuple[Problem, int, int], flags: int, step: int, rate: float, device: torch.device
) -> Tensor:
    """The header, [9] int64 on ``device``."""
    count = embeddings.shape[0] if embeddings.dim() else 0
    dim = embeddings.shape[1] if embeddings.dim() == 2 else -1
    return torch.tensor(
        [count, dtype_code(embeddings.dtype), dim, flags, step, int(rate * 2.0**53), *problem], device=device
    )


def check_values(header: Tensor, embeddings: Tensor, labels: Tensor, num_classes: int, check_finite: bool) -> None:
    """Write a label out of range, or a non-finite embedding, into ``header``; never waits for the device."""
    if not len(labels):
        return
    outside = (labels < -1) | (labels >= num_classes)
    sample = outside.int().argmax()
    label_problem = torch.stack((torch.full_like(sample, Problem.LABEL_RANGE), sample, labels[sample]))
    found = header[Field.ERROR :]
    found.copy_(torch.where(outside.any(), label_problem, found))
    if check_finite:
        broken = ~torch.isfinite(embeddings).all(dim=1) & (labels != -1)
        sample = broken.int().argmax()
        problem = torch.stack((torch.full_like(sample, Problem.NON_FINITE), sample, broken.sum()))
        found.copy_(torch.where(broken.any() & (found[0] == 0), problem, found))


def pack(header: Tensor, embeddings: Tensor, labels: Tensor, agreed: BatchFormat, host_problem: bool) -> Tensor:
    """The message, [num_bytes] uint8: missing samples are zeros with label -1; none at all if there is a problem."""
    message = torch.zeros(agreed.num_bytes, dtype=torch.uint8, device=header.device)
    label_start = HEADER_FIELDS * 8
    embedding_start = label_start + agreed.label_bytes
    message[:label_start].view(torch.int64).copy_(header)
    label_space = message[label_start:embedding_start].view(torch.int64)
    label_space.fill_(-1)
    if not host_problem:
        count = len(labels)
        label_space[:count] = labels
        embedding_space = message[embedding_start : embedding_start + agreed.embedding_bytes].view(agreed.dtype)
        embedding_space.view(agreed.capacity, agreed.dim)[:count] = embeddings.detach()
    return message


def unpack(messages: Tensor, agreed: BatchFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Headers [W, 9], labels [W·capacity] and embeddings [W·capacity, dim] from gathered messages [W, num_bytes]."""
    label_start = HEADER_FIELDS * 8
    embedding_start = label_start + agreed.label_bytes
    headers = messages[:, :label_start].contiguous().view(torch.int64)
    labels = messages[:, label_start:embedding_start].contiguous().view(torch.int64).flatten()
    payload = messages[:, embedding_start : embedding_start + agreed.embedding_bytes].contiguous()
    return headers, labels, payload.view(agreed.dtype).view(-1, agreed.dim)


def any_problem(headers: Tensor) -> Tensor:
    """Whether any rank reports a problem or the ranks disagree; a bool on the headers' device."""
    shared = headers[:, [Field.FLAGS, Field.STEP, Field.RATE]]
    return (headers[:, Field.ERROR] != 0).any() | (shared != shared[0]).any()


def raise_problem(headers: list[list[int]], num_classes: int, dim: int, agreed: BatchFormat | None) -> None:
    """Raise what the gathered ``headers`` report, in words that are the same on every rank; return if all is well."""
    failing = [rank for rank, header in enumerate(headers) if header[Field.ERROR]]
    if failing:
        others = f" (ranks {', '.join(map(str, failing[1:]))} report problems too)" if failing[1:] else ""
        _raise_reported(failing[0], headers[failing[0]], others, num_classes, dim, agreed)
    shared: dict[str, list[object]] = {
        "the step": [header[Field.STEP] for header in headers],
        "the mode": [_mode(header[Field.FLAGS]) for header in headers],
        "the sample rate": [header[Field.RATE] * 2.0**-53 for header in headers],
    }
    for what, values in shared.items():
        if len(set(values)) > 1:
            differing = next(rank for rank, value in enumerate(values) if value != values[0])
            raise BatchMismatch(
                f"ranks disagree about {what}: rank 0 has {values[0]}, rank {differing} has {values[differing]}; "
                "call the head in the same way on every rank"
            )


def _mode(flags: int) -> str:
    mode = "training" if flags & FLAG_TRAINING else "evaluation"
    return f"{mode} {'with' if flags & FLAG_BACKWARD else 'without'} gradients"


def _raise_reported(
    rank: int, header: list[int], others: str, num_classes: int, dim: int, agreed: BatchFormat | None
) -> NoReturn:
    problem, a, b = Problem(header[Field.ERROR]), header[Field.DETAIL_A], header[Field.DETAIL_B]
    count, capacity = header[Field.COUNT], agreed.capacity if agreed else 0
    code = header[Field.DTYPE]
    dtype = str(dtype_of(code)) if code >= 0 else "another dtype"
    label_dtype = str(dtype_of(a)) if problem is Problem.LABELS_DTYPE and a >= 0 else "another dtype"
    messages: dict[Problem, tuple[type[PartialFCError], str]] = {
        Problem.NOT_2D: (BatchMismatch, f"embeddings must be [batch, {dim}], got a tensor of {a} dimensions"),
        Problem.NOT_FLOAT: (BatchMismatch, f"embeddings must be float32, float64, float16 or bfloat16, got {dtype}"),
        Problem.WRONG_DIM: (BatchMismatch, f"embeddings must be [batch, {dim}], got [{count}, {header[Field.DIM]}]"),
        Problem.LABELS_SHAPE: (
            BatchMismatch,
            f"labels must be [{count}], one for each embedding, got {a} labels in {b} dimensions",
        ),
        Problem.LABELS_DTYPE: (BatchMismatch, f"labels must be int64, got {label_dtype}; use labels.long()"),
        Problem.WRONG_DEVICE: (BatchMismatch, "embeddings and labels must be on the device of the head's weight"),
        Problem.TOO_LARGE: (
            BatchMismatch,
            f"a batch of {count} samples exceeds the {capacity} agreed at the first call; pass the largest batch "
            "first, or call head.reset_batch_format() on every rank",
        ),
        Problem.DTYPE_CHANGED: (
            BatchMismatch,
            f"embeddings are {dtype}, but {dtype_of(a) if problem is Problem.DTYPE_CHANGED else ''} was agreed at the "
            "first call; convert them, or call head.reset_batch_format() on every rank",
        ),
        Problem.LABEL_RANGE: (
            LabelOutOfRange,
            f"label {b} (sample {a} of its batch) is outside [0, {num_classes}); use -1 to ignore a sample",
        ),
        Problem.NON_FINITE: (
            NonFiniteEmbeddings,
            f"{b} of {count} embeddings hold NaN or Inf, the first at sample {a} of its batch; look at the learning "
            "rate, the loss scale and the input of that sample",
        ),
    }
    error, text = messages[problem]
    raise error(f"rank {rank}: {text}{others}")
