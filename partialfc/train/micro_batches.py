"""The micro-batches of a step, and their merged output."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from partialfc.head import HeadOutput


def micro_batches(images: Tensor, labels: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the ``parts`` slices of a batch, all of one size, as the loader has laid them out."""
    size = len(labels) // parts
    for part in range(parts):
        rows = slice(part * size, (part + 1) * size)
        yield images[rows], labels[rows]


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
        max(out.active_rows for out, _ in outputs),
    )
