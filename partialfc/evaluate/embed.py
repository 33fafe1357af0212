"""Embeddings of a whole data set; the ranks share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partialfc.models.eval_mode import eval_mode


@torch.no_grad()
def embed(
    backbone: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_samples: int,
    dim: int,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Return the embeddings of all samples, [num_samples, dim] float32, not normalised, on every rank. A collective.

    Args:
        batches: this rank's (indices [b], images [b, C, H, W]); the ranks' batches together hold every sample once.
        interrupted: called before each batch; once it returns True, the rest is skipped and the result is useless.
    """
    embeddings = torch.zeros(num_samples, dim, device=device)
    with eval_mode(backbone):
        for indices, images in batches:
            if interrupted():
                break
            embeddings[indices.to(device)] = backbone(images.to(device, non_blocking=True)).float()
    if dist.is_initialized():
        dist.all_reduce(embeddings)
    return embeddings
