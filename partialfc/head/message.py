"""The packed message of a rank: header, labels and embeddings in one buffer.

The buffer has the same size on every rank and in every step, so one all-gather moves everything, and an error found on
one rank travels with the batch: all ranks read the same headers and raise the same exception.

Layout (bytes): 9 int64 of header | capacity int64 labels | capacity × dim embeddings | padding to 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from partialfc.head.transfers import send

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# A dtype travels as its position in this tuple.
_DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class Field(IntEnum):
    """Positions in a header."""

    COUNT = 0  # samples this rank passed
    DTYPE = 1  # of the embeddings
    DIM = 2  # of the embeddings
    FLAGS = 3  # see FLAG_*
    STEP = 4
    RATE = 5  # the sample rate, in units of 2^-53
    PROBLEM = 6  # a batch_errors.Problem
    DETAIL_A = 7
    DETAIL_B = 8


HEADER_BYTES = 8 * len(Field)
FLAG_TRAINING, FLAG_BACKWARD = 1, 2


@dataclass(frozen=True)
class BatchFormat:
    """Shape and dtype of the message, agreed by all ranks at the first call."""

    capacity: int  # most samples of a rank
    dim: int
    dtype: torch.dtype  # of the embeddings

    @property
    def embeddings_start(self) -> int:
        """First byte of the embeddings."""
        return HEADER_BYTES + self.capacity * 8

    @property
    def embeddings_stop(self) -> int:
        """One past the last byte of the embeddings."""
        return self.embeddings_start + self.capacity * self.dim * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Size of the message."""
        return (self.embeddings_stop + 7) // 8 * 8


def dtype_code(dtype: torch.dtype) -> int:
    """Return the code of ``dtype`` in a header; -1 for one that embeddings and labels cannot have."""
    return _DTYPES.index(dtype) if dtype in _DTYPES else -1


def dtype_of(code: int) -> torch.dtype | None:
    """Return the dtype of a code made by :func:`dtype_code`; None for -1."""
    return _DTYPES[code] if code >= 0 else None


def make_header(
    embeddings: Tensor, problem: tuple[int, int, int], flags: int, step: int, rate: float, device: torch.device
) -> Tensor:
    """Return the header, [9] int64 on ``device``; ``problem`` fills its last three fields."""
    count = embeddings.shape[0] if embeddings.dim() else 0
    dim = embeddings.shape[1] if embeddings.dim() == 2 else -1
    fields = [count, dtype_code(embeddings.dtype), dim, flags, step, int(rate * 2.0**53), *problem]
    return send(torch.tensor(fields, device="cpu"), device)


def pack(header: Tensor, labels: Tensor | None, embeddings: Tensor, agreed: BatchFormat) -> Tensor:
    """Return the message, [num_bytes] uint8; missing samples are zeros with label -1.

    Args:
        header: [9] int64.
        labels: [b] int64, b ≤ capacity; None: the batch cannot be sent, only the header that says why.
        embeddings: [b, dim] of the agreed dtype.
    """
    message = torch.zeros(agreed.num_bytes, dtype=torch.uint8, device=header.device)
    message[:HEADER_BYTES].view(torch.int64).copy_(header)
    label_space = message[HEADER_BYTES : agreed.embeddings_start].view(torch.int64)
    label_space.fill_(-1)
    if labels is not None:
        label_space[: len(labels)] = labels
        embedding_space = message[agreed.embeddings_start : agreed.embeddings_stop].view(agreed.dtype)
        embedding_space.view(agreed.capacity, agreed.dim)[: len(labels)] = embeddings.detach()
    return message


def unpack(messages: Tensor, agreed: BatchFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Split gathered messages [W, num_bytes] into headers [W, 9], labels [W·capacity], embeddings [W·capacity, dim]."""
    headers = messages[:, :HEADER_BYTES].contiguous().view(torch.int64)
    labels = messages[:, HEADER_BYTES : agreed.embeddings_start].contiguous().view(torch.int64).flatten()
    embeddings = messages[:, agreed.embeddings_start : agreed.embeddings_stop].contiguous()
    return headers, labels, embeddings.view(agreed.dtype).view(-1, agreed.dim)
