"""The micro-batches of a step, and their merged output."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.data.loader import Batch
from partialfc.head import HeadOutput


def micro_batches(batch: Batch, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield, on ``device``, images [n, C, H, W] and labels [n] of each micro-batch, and its images over all ranks."""
    images = batch.images.to(device, non_blocking=True).split(batch.counts)
    labels = batch.labels.to(device, non_blocking=True).split(batch.counts)
    yield from zip(images, labels, batch.counts_of_all_ranks, strict=True)


def padded(embeddings: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return embeddings [size, D] and labels [size], the missing ones zeros with label -1: ranks exchange equal parts,
    and the head would take the first batch of a start, which may be a short one, for the largest.
    """
    missing = size - len(labels)
    if not missing:
        return embeddings, labels
    return F.pad(embeddings, (0, 0, 0, missing)), F.pad(labels, (0, missing), value=-1)


def merge_outputs(outputs: list[tuple[HeadOutput, Tensor]]) -> HeadOutput:
    """Merge the outputs of micro-batches, each with its share [] of the samples, into the output of the whole batch."""
    if len(outputs) == 1:
        return outputs[0][0]

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(out, name).detach() * share for out, share in outputs]).sum(0)

    return HeadOutput(
        mean("loss"),
        mean("softmax_loss"),
        mean("center_loss"),
        mean("target_cosine"),
        torch.stack([out.num_samples for out, _ in outputs]).sum(0),
        torch.stack([out.num_active for out, _ in outputs]).amax(),
    )
