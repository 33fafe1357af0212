"""Before an update all ranks agree: does it happen, and does the run go on after it?

What speaks against it may be seen by one rank only: NaN in its embeddings, in its part of the backbone's gradient, in
its shard of the head. One small all-reduce, before either optimizer steps, tells all; requests to stop travel with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag

import torch
import torch.distributed as dist
from torch import Tensor

from partialfc.data.dataset import TarDataset
from partialfc.errors import PartialFCError
from partialfc.head import PartialFC
from partialfc.runtime.collectives import all_gather_object
from partialfc.runtime.process import ProcessContext

_SHOWN = 8  # sample keys of a rank that are written down
_PIECE = 1 << 14  # rows looked at at once


class Diverged(PartialFCError, ArithmeticError):
    """The numbers are no longer finite, and skipping steps does not help."""


class StepFlags(IntFlag):
    """What a rank has to say of a step."""

    STOP = 1  # it has been asked to stop
    EMBEDDINGS = 2  # its embeddings hold NaN or Inf
    LOSS = 4  # the loss does, as on every rank
    HEAD = 8  # the gradient of its shard does, or what its centers would move by
    BACKBONE = 16  # its own part of the backbone's gradient does
    MEAN = 32  # the mean of the ranks' parts does
    SPIKE = 64  # the loss has jumped; the first rank decides


_BROKEN = StepFlags.EMBEDDINGS | StepFlags.LOSS | StepFlags.HEAD | StepFlags.BACKBONE | StepFlags.MEAN


@dataclass(frozen=True)
class StepDecision:
    """The words of all ranks, in their order."""

    words: list[StepFlags]

    @property
    def stop(self) -> bool:
        return any(StepFlags.STOP in word for word in self.words)

    @property
    def broken(self) -> bool:
        """Whether NaN or Inf has been seen anywhere."""
        return any(word & _BROKEN for word in self.words)

    @property
    def spike(self) -> bool:
        return StepFlags.SPIKE in self.words[0]


@dataclass
class StepCheck:
    """What this rank sees during a step, collected without waiting for a device."""

    device: torch.device
    broken_samples: list[Tensor] = field(default_factory=list)  # of each micro-batch [b] bool
    _seen: Tensor | None = None  # [] int64, of StepFlags

    def embeddings(self, embeddings: Tensor) -> None:
        """Look at a micro-batch's embeddings [b, D]."""
        broken = ~embeddings.detach().isfinite().all(dim=1)
        self.broken_samples.append(broken)
        self._see(broken.any(), StepFlags.EMBEDDINGS)

    def loss(self, loss: Tensor) -> None:
        """Look at a micro-batch's loss []."""
        self._see(~loss.detach().isfinite(), StepFlags.LOSS)

    def gradients(self, own_is_finite: Tensor, mean_is_finite: Tensor, head_is_finite: Tensor) -> None:
        """Look at the gradients of the whole step, each [] bool: the backbone's, this rank's own part and the mean over
        ranks, and that of the head's shard.
        """
        self._see(~own_is_finite, StepFlags.BACKBONE)
        self._see(~mean_is_finite, StepFlags.MEAN)
        self._see(~head_is_finite, StepFlags.HEAD)

    def _see(self, bad: Tensor, word: StepFlags) -> None:
        seen = torch.zeros((), dtype=torch.int64, device=self.device) if self._seen is None else self._seen
        self._seen = seen | bad.long() * int(word)

    def agree(self, process: ProcessContext, known: StepFlags) -> StepDecision:
        """Tell the other ranks, and hear them; ``known`` is what the host has to say. A collective."""
        assert self._seen is not None, "nothing has been looked at"
        words = torch.zeros(process.world_size, dtype=torch.int64, device=self.device)
        words[process.rank] = self._seen | int(known)
        if process.world_size > 1:
            dist.all_reduce(words)
        return StepDecision([StepFlags(word) for word in words.tolist()])


@dataclass(frozen=True)
class Fault:
    """Where a step was broken, as far as can be told."""

    rank: int
    what: str
    keys: list[str]  # samples at fault; of a gradient, some of the rank's batch
    samples: int  # how many

    def __str__(self) -> str:
        some = f" ({', '.join(self.keys)}{', …' if self.samples > len(self.keys) else ''})" if self.keys else ""
        return f"rank {self.rank}: {self.what}{some}"


def find_faults(
    verdict: StepDecision,
    check: StepCheck,
    indices: Tensor,
    dataset: TarDataset,
    head: PartialFC,
    process: ProcessContext,
) -> list[Fault]:
    """Who has broken a step, root causes only: what is broken on one rank soon is everywhere. A collective.

    Args:
        indices: of this rank's samples [b], micro-batch by micro-batch; -1 where padded.
    """
    mine = verdict.words[process.rank]
    seen = verdict.words[0]
    for word in verdict.words:
        seen |= word
    what, at_fault = None, torch.ones_like(indices, dtype=torch.bool)
    if StepFlags.EMBEDDINGS in seen:
        if StepFlags.EMBEDDINGS in mine:
            what, at_fault = "NaN or Inf in embeddings", torch.cat(check.broken_samples).cpu()
    elif StepFlags.LOSS in seen:
        classes = nonfinite_classes(head)
        if len(classes):
            what = f"NaN or Inf in the head's rows or centers of {_classes(classes)}"
        at_fault &= False
    elif mine & (StepFlags.BACKBONE | StepFlags.HEAD):
        where = "backbone's gradient" if StepFlags.BACKBONE in mine else "gradient of the head's shard"
        what = f"NaN or Inf in the {where}"
    faults = []
    if what:
        found = indices[at_fault & (indices >= 0)].tolist()
        faults = [Fault(process.rank, what, [dataset.key(index) for index in found[:_SHOWN]], len(found))]
    everyone = [fault for faults in all_gather_object(faults) for fault in faults]
    where = "the loss itself" if StepFlags.LOSS in seen else "the mean of the ranks' gradients"
    return everyone or [Fault(0, f"NaN or Inf in {where}, as on all ranks", [], 0)]


@torch.no_grad()
def nonfinite_classes(head: PartialFC) -> Tensor:
    """Ids of the classes of this shard whose weight, bias or center holds NaN or Inf, [n]. Walks the shard."""
    rows = len(head.weight)
    broken = torch.zeros(rows, dtype=torch.bool, device=head.weight.device)
    tensors = [head.weight, head.bias, None if head.center_loss is None else head.center_loss.centers]
    for tensor in (tensor for tensor in tensors if tensor is not None):
        for start in range(0, rows, _PIECE):
            piece = tensor[start : start + _PIECE]
            broken[start : start + _PIECE] |= ~piece.view(len(piece), -1).isfinite().all(dim=1)
    return broken.nonzero()[:, 0].cpu() + head.first_class


def _classes(ids: Tensor) -> str:
    some = ", ".join(map(str, ids[:_SHOWN].tolist()))
    return f"class {some}" if len(ids) == 1 else f"{len(ids):,} classes ({some}{', …' if len(ids) > _SHOWN else ''})"
