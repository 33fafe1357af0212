"""The global batch: collective 1 of a step gathers every rank's samples, and every rank's errors."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from partialfc.errors import BatchMismatch, LabelOutOfRange
from partialfc.head.batch_errors import Problem, any_problem, check_form, check_values, raise_problem
from partialfc.head.collectives import Collectives
from partialfc.head.message import (
    FLAG_BACKWARD,
    FLAG_TRAINING,
    FLOATS,
    BatchFormat,
    Field,
    dtype_code,
    dtype_of,
    make_header,
    pack,
    unpack,
)
from partialfc.head.transfers import DeferredRead


@dataclass(frozen=True)
class LocalBatch:
    """This rank's part of the batch, and the settings of the call, which must be the same on every rank."""

    embeddings: Tensor  # [b, D]
    labels: Tensor  # [b] int64
    step: int
    rate: float  # sample rate
    training: bool
    wants_grad: bool
    check_finite: bool  # refuse NaN and Inf in embeddings


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of all ranks, in rank order. Each rank's part is padded to the same size with label -1."""

    embeddings: Tensor  # [B, D] of the dtype passed; 0 where the label is -1
    labels: Tensor  # [B] int64; -1 = ignored
    positions: Tensor  # [B] int64: positions in the global batch, padding left out
    check: Callable[[], None] | None = None  # raises the errors that the host has not read yet


class BatchGather:
    """Gathers the global batch, and raises the errors of any rank on every rank.

    On a CPU errors are raised at once. Elsewhere, reading them would mean waiting for the device: a bad batch is
    ignored as a whole, and :attr:`GlobalBatch.check` raises its errors later.

    Args:
        collectives: of the head.
        num_classes: labels must lie below it.
        dim: of the embeddings.
    """

    def __init__(self, collectives: Collectives, num_classes: int, dim: int) -> None:
        self.collectives, self.num_classes, self.dim = collectives, num_classes, dim
        self.format: BatchFormat | None = None  # agreed at the first call; None for a single process

    def agree_on_format(self, embeddings: Tensor, head: str, device: torch.device) -> None:
        """Check that the ranks' heads, as described by ``head``, are equal; agree on batch size and dtype.

        A separate collective, at the first call and after :attr:`format` was set to None.

        Raises:
            BatchMismatch: heads or dtypes differ, or the dtype is not a float.
        """
        count = embeddings.shape[0] if embeddings.dim() else 0
        mine = torch.tensor([count, dtype_code(embeddings.dtype), zlib.crc32(head.encode())], device=device)
        ranks = self.collectives.gather(mine).tolist()
        for rank, (_, code, digest) in enumerate(ranks):
            if digest != ranks[0][2]:
                raise BatchMismatch(
                    f"the heads of rank 0 and rank {rank} differ: num_classes, embedding_dim, loss, "
                    "seed and all other arguments must be the same on every rank"
                )
            if code != ranks[0][1]:
                raise BatchMismatch(f"embeddings of rank 0 and rank {rank} differ in dtype; use one dtype")
        dtype = dtype_of(ranks[0][1])
        if dtype not in FLOATS:
            raise BatchMismatch(f"embeddings must be float32, float64, float16 or bfloat16, got {dtype} on every rank")
        self.format = BatchFormat(max(1, *(count for count, _, _ in ranks)), self.dim, dtype)

    def gather(self, local: LocalBatch, device: torch.device) -> GlobalBatch:
        """Gather the batch on ``device``; a collective if there is a process group.

        Raises:
            BatchMismatch, LabelOutOfRange, NonFiniteEmbeddings: on every rank, whichever rank is at fault.
        """
        flags = FLAG_TRAINING * local.training | FLAG_BACKWARD * local.wants_grad
        finding = check_form(local.embeddings, local.labels, self.dim, device, self.format)
        well_formed = finding.problem is Problem.NONE
        header = make_header(local.embeddings, finding, flags, local.step, local.rate, device)
        if well_formed:
            check_values(header, local.embeddings, local.labels, self.num_classes, local.check_finite)
        if self.format is None:  # a single process
            headers, labels, embeddings = header[None], local.labels, local.embeddings.detach()
        else:
            message = pack(header, local.labels if well_formed else None, local.embeddings, self.format)
            headers, labels, embeddings = unpack(self.collectives.gather(message), self.format)
        check = partial(self._raise_problem, DeferredRead(headers), self.format)
        deferred = errors_are_deferred(device) and (well_formed or self.format is not None)
        if deferred:
            labels = labels.masked_fill(any_problem(headers), -1)  # ignores the whole batch: nothing is updated
        else:
            check()
        # Ignored samples have no influence, not even as NaN.
        embeddings = embeddings.masked_fill((labels < 0)[:, None], 0.0)
        positions = _positions(headers[:, Field.COUNT], len(labels))
        return GlobalBatch(embeddings, labels, positions, check if deferred else None)

    def _raise_problem(self, headers: DeferredRead, agreed: BatchFormat | None) -> None:
        raise_problem(headers.read(), self.num_classes, self.dim, agreed)


def errors_are_deferred(device: torch.device) -> bool:
    """Return True if reading a value on ``device`` would make the host wait."""
    return device.type != "cpu"


def _positions(counts: Tensor, batch: int) -> Tensor:
    """Return the position [B] int64 of each gathered sample, from the samples [W] that each rank passed."""
    within = torch.arange(batch // len(counts), device=counts.device)
    return ((counts.cumsum(0) - counts)[:, None] + within).flatten()


def check_class_ids(ids: Tensor, num_classes: int, collectives: Collectives) -> None:
    """Check that all ranks pass the same ``ids [n]`` int64, each in [0, num_classes). A collective.

    Raises:
        LabelOutOfRange, BatchMismatch: on every rank.
    """
    outside = ids[(ids < 0) | (ids >= num_classes)]
    digest = zlib.crc32(ids.cpu().numpy().tobytes())
    mine = torch.tensor([len(ids), digest, len(outside), int(outside[0]) if len(outside) else 0])
    ranks = collectives.gather(mine.to(ids.device)).tolist()
    for rank, (_, _, wrong, example) in enumerate(ranks):
        if wrong:
            raise LabelOutOfRange(f"rank {rank}: class id {example} is outside [0, {num_classes})")
    if any(other[:2] != ranks[0][:2] for other in ranks):
        raise BatchMismatch("rows() needs the same class ids on every rank; gather them first")
