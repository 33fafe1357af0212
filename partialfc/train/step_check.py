"""Agreement of all ranks, before each update, to apply or to skip the step, and to stop after it.

NaN or Inf may be on one rank only: in its embeddings, in its part of the backbone's gradient, in its shard of the head.
One small all-reduce, before either optimizer steps, shares what every rank has found; requests to stop travel with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag

import torch
import torch.distributed as dist
from torch import Tensor

from partialfc.data.dataset import TarDataset
from partialfc.head import PartialFC
from partialfc.runtime.collectives import all_gather_object
from partialfc.runtime.process import ProcessContext
from partialfc.train.loss_spikes import SpikeRule

_MOST_SHOWN = 8  # sample keys of a rank, or class ids, in a message
_ROWS_AT_ONCE = 1 << 14


class StepFlags(IntFlag):
    """Findings of one rank in a step."""

    STOP = 1  # the rank has been asked to stop
    EMBEDDINGS = 2  # its embeddings hold NaN or Inf
    LOSS = 4  # the loss is not finite, as on every rank
    HEAD = 8  # the gradient of its shard, or of its centers, is not finite
    BACKBONE = 16  # its own part of the backbone's gradient is not finite
    MEAN = 32  # the mean of the ranks' parts is not finite


_NONFINITE = StepFlags.EMBEDDINGS | StepFlags.LOSS | StepFlags.HEAD | StepFlags.BACKBONE | StepFlags.MEAN


@dataclass(frozen=True)
class StepDecision:
    """The findings of all ranks, equal on all ranks."""

    flags: list[StepFlags]  # by rank
    loss: float  # of the step, as rank 0 has it
    spike: bool  # the loss has jumped

    @property
    def any_rank(self) -> StepFlags:
        """Flags that at least one rank has set."""
        union = StepFlags(0)
        for flags in self.flags:
            union |= flags
        return union

    @property
    def stop(self) -> bool:
        """True if any rank has been asked to stop."""
        return StepFlags.STOP in self.any_rank

    @property
    def nonfinite(self) -> bool:
        """True if any rank has found NaN or Inf."""
        return bool(self.any_rank & _NONFINITE)


@dataclass
class StepCheck:
    """Collects the findings of this rank in a step, without waiting for the device."""

    device: torch.device
    nonfinite_samples: list[Tensor] = field(default_factory=list)  # of each micro-batch, [b] bool
    _flags: Tensor | None = None  # [] int64, StepFlags

    def embeddings(self, embeddings: Tensor) -> None:
        """Check a micro-batch's embeddings [b, D]."""
        nonfinite = ~embeddings.detach().isfinite().all(dim=1)
        self.nonfinite_samples.append(nonfinite)
        self._set_if(nonfinite.any(), StepFlags.EMBEDDINGS)

    def loss(self, loss: Tensor) -> None:
        """Check a micro-batch's loss []."""
        self._set_if(~loss.detach().isfinite(), StepFlags.LOSS)

    def gradients(self, own_is_finite: Tensor, mean_is_finite: Tensor, head_is_finite: Tensor) -> None:
        """Record the checks of the step's gradients, each [] bool: this rank's own part of the backbone's gradient, its
        mean over the ranks, and the gradient of the head's shard.
        """
        self._set_if(~own_is_finite, StepFlags.BACKBONE)
        self._set_if(~mean_is_finite, StepFlags.MEAN)
        self._set_if(~head_is_finite, StepFlags.HEAD)

    def _set_if(self, condition: Tensor, flag: StepFlags) -> None:
        flags = torch.zeros((), dtype=torch.int64, device=self.device) if self._flags is None else self._flags
        self._flags = flags | condition.long() * int(flag)

    def agree(self, process: ProcessContext, loss: Tensor, spikes: SpikeRule | None) -> StepDecision:
        """Exchange the findings of all ranks, and their requests to stop. A collective.

        This is the one place of a step where the host waits for a GPU: before it launches an update, it must know that
        there is to be one. Meanwhile the forward and the backward pass run; the time that the device then waits for the
        update's first kernels is that of their launch.

        Args:
            process: of this rank.
            loss: [] of the step.
            spikes: tells whether the loss is a spike, and takes note of it; in the same state on all ranks.
        """
        assert self._flags is not None, "nothing has been checked"
        found = torch.zeros(process.world_size + 1, dtype=torch.float64, device=self.device)
        found[process.rank] = self._flags | int(StepFlags.STOP if process.stop.requested else 0)
        if process.is_first:
            found[-1] = loss.detach()
        if process.world_size > 1:
            dist.all_reduce(found)
        *flags, of_step = found.tolist()
        spike = spikes is not None and spikes.is_spike(of_step)
        return StepDecision([StepFlags(int(value)) for value in flags], of_step, spike)


@dataclass(frozen=True)
class Fault:
    """Origin of NaN or Inf in a step, if known."""

    rank: int
    what: str
    keys: list[str]  # of samples at fault; for a gradient, some samples of the rank's batch
    samples: int  # their number

    def __str__(self) -> str:
        more = ", …" if self.samples > len(self.keys) else ""
        return f"rank {self.rank}: {self.what}" + (f" ({', '.join(self.keys)}{more})" if self.keys else "")


def find_faults(
    decision: StepDecision,
    check: StepCheck,
    indices: Tensor,
    dataset: TarDataset,
    head: PartialFC,
    process: ProcessContext,
) -> list[Fault]:
    """Return the root causes of a skipped step: NaN on one rank soon reaches all of them. A collective.

    Args:
        indices: of this rank's samples [n], micro-batch by micro-batch.
    """
    mine, any_rank = decision.flags[process.rank], decision.any_rank
    what, at_fault = None, torch.ones_like(indices, dtype=torch.bool)
    if StepFlags.EMBEDDINGS in any_rank:
        if StepFlags.EMBEDDINGS in mine:
            what, at_fault = "NaN or Inf in embeddings", torch.cat(check.nonfinite_samples).cpu()
    elif StepFlags.LOSS in any_rank:
        classes = nonfinite_classes(head)
        if len(classes):
            what = f"NaN or Inf in the head's rows or centers of {_describe_classes(classes)}"
        at_fault &= False
    elif mine & (StepFlags.BACKBONE | StepFlags.HEAD):
        where = "backbone's gradient" if StepFlags.BACKBONE in mine else "gradient of the head's shard"
        what = f"NaN or Inf in the {where}"
    faults = []
    if what:
        found = indices[at_fault].tolist()
        faults = [Fault(process.rank, what, [dataset.key(index) for index in found[:_MOST_SHOWN]], len(found))]
    of_all_ranks = [fault for faults in all_gather_object(faults) for fault in faults]
    where = "the loss itself" if StepFlags.LOSS in any_rank else "the mean of the ranks' gradients"
    return of_all_ranks or [Fault(0, f"NaN or Inf in {where}, as on all ranks", [], 0)]


@torch.no_grad()
def nonfinite_classes(head: PartialFC) -> Tensor:
    """Return the ids [n] of this shard's classes whose weight, bias or center holds NaN or Inf. Walks the shard."""
    rows = len(head.weight)
    nonfinite = torch.zeros(rows, dtype=torch.bool, device=head.weight.device)
    tensors = [head.weight, head.bias, None if head.center_loss is None else head.center_loss.centers]
    for tensor in (tensor for tensor in tensors if tensor is not None):
        for start in range(0, rows, _ROWS_AT_ONCE):
            piece = tensor[start : start + _ROWS_AT_ONCE]
            nonfinite[start : start + _ROWS_AT_ONCE] |= ~piece.view(len(piece), -1).isfinite().all(dim=1)
    return nonfinite.nonzero()[:, 0].cpu() + head.first_class


def _describe_classes(ids: Tensor) -> str:
    some = ", ".join(map(str, ids[:_MOST_SHOWN].tolist()))
    more = ", …" if len(ids) > _MOST_SHOWN else ""
    return f"class {some}" if len(ids) == 1 else f"{len(ids):,} classes ({some}{more})"
