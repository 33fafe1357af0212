"""A custom loss, sharded and sampled like the built-in ones.

    torchrun --nproc-per-node 2 examples/custom_loss.py      # or: python examples/custom_loss.py

Its margin grows with the distance to the class centre: far samples pull harder than under a constant margin. A loss
turns cosines into logits and knows nothing of ranks, shards or sampling; the head differentiates it.
docs/write-your-own-loss.md has the full contract.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from partialfc import PartialFC, RowSGD, losses
from partialfc.losses.base import check_range

NUM_CLASSES, EMBEDDING_DIM, GLOBAL_BATCH = 500, 32, 64


class SquaredChord(losses.Loss):
    """``z_y = s(cos θ_y − m‖x − w_y‖²/2)``, ``z_j = s·cos θ_j``; for unit vectors ``‖x − w‖² = 2 − 2cos θ``."""

    def __init__(self, scale: float = 16.0, margin: float = 0.3) -> None:
        super().__init__(scale)
        self.margin = check_range("margin", margin, 0.0, 1.0)

    def target_logit(self, cosine: Tensor, samples: losses.Samples) -> Tensor:
        return self.scale * (cosine - self.margin * (1.0 - cosine))


def main() -> None:
    distributed = "RANK" in os.environ
    if distributed:
        dist.init_process_group("gloo")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)

    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(NUM_CLASSES, EMBEDDING_DIM, generator=generator)
    # Wrapped in focal loss, as any other loss could be.
    head = PartialFC(NUM_CLASSES, EMBEDDING_DIM, losses.Focal(SquaredChord(), gamma=1.0), sample_rate=0.5)
    optimizer = RowSGD(head.parameters(), lr=2.0)
    for step in range(100):
        labels = torch.randint(0, NUM_CLASSES, (GLOBAL_BATCH,), generator=generator)
        mine = labels.tensor_split(world_size)[rank]
        out = head(embeddings[mine], mine)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step + 1) % 25 == 0:
            print(
                f"step {step + 1}  loss {out.loss.item():.3f}  target cosine {out.target_cosine.item():.3f}", flush=True
            )
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
