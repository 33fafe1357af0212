"""The sharded head in a plain DistributedDataParallel loop, with torch and partialfc only.

    torchrun --nproc-per-node 2 examples/ddp_loop.py      # or: python examples/ddp_loop.py

Each of the 1,000 classes is a random picture, each sample a noisy copy of it. Replace `make_backbone` and `batches`
with your own; the loop stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partialfc import PartialFC, RowSGD, losses

NUM_CLASSES, PIXELS, EMBEDDING_DIM, GLOBAL_BATCH, STEPS = 1000, 256, 64, 128, 300


def make_backbone() -> nn.Module:
    return nn.Sequential(nn.Linear(PIXELS, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, EMBEDDING_DIM))


def batches(rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's share of every global batch: images [b, PIXELS] and labels [b]."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(NUM_CLASSES, PIXELS, generator=generator)
    for _ in range(STEPS):
        labels = torch.randint(0, NUM_CLASSES, (GLOBAL_BATCH,), generator=generator)
        images = pictures[labels] + torch.randn(GLOBAL_BATCH, PIXELS, generator=generator)
        yield images.tensor_split(world_size)[rank], labels.tensor_split(world_size)[rank]


def main() -> None:
    on_gpu, distributed = torch.cuda.is_available(), "RANK" in os.environ
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if distributed:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)

    torch.manual_seed(0)
    backbone = make_backbone().to(device)
    ddp = DistributedDataParallel(backbone) if distributed else backbone
    # Not wrapped in DDP: each rank owns different classes.
    head = PartialFC(NUM_CLASSES, EMBEDDING_DIM, losses.CosFace(scale=16.0, margin=0.2), sample_rate=0.3, device=device)
    optimizers = [torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9), RowSGD(head.parameters(), lr=0.5)]
    for step, (images, labels) in enumerate(batches(rank, world_size)):
        out = head(ddp(images.to(device)), labels.to(device))
        out.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0 and (step + 1) % 50 == 0:
            print(
                f"step {step + 1}  loss {out.loss.item():.3f}  target cosine {out.target_cosine.item():.3f}", flush=True
            )
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
