"""A head over embeddings in a file: text, audio or products embedded by another model.

    python examples/stored_embeddings.py --out /tmp/stored                 # writes a small file first, then trains
    torchrun --nproc-per-node 2 examples/stored_embeddings.py --embeddings X.npy --labels Y.npy --out DIR

X is [N, D] float, Y [N] int64 class ids from 0. A linear projection and the sharded head are trained; the projection
and the centre of every class are written to DIR as .npy. Both inputs are memory-mapped: they may be larger than memory.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from partialfc import PartialFC, RowSGD, losses


def write_sample(folder: Path) -> tuple[Path, Path]:
    """Write 200 classes of 10 noisy vectors each, and return the two files."""
    rng = np.random.default_rng(0)
    labels = np.arange(200).repeat(10)
    embeddings = rng.normal(size=(200, 48))[labels] + 0.5 * rng.normal(size=(len(labels), 48))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "embeddings.npy", embeddings.astype(np.float32))
    np.save(folder / "labels.npy", labels)
    return folder / "embeddings.npy", folder / "labels.npy"


def train(embeddings: Path, labels: Path, out: Path, dim: int, epochs: int, batch: int) -> None:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, y = np.load(embeddings, mmap_mode="r"), np.load(labels, mmap_mode="r")
    torch.manual_seed(0)
    projection = nn.Linear(x.shape[1], dim)
    backbone = DistributedDataParallel(projection) if dist.is_initialized() else projection
    head = PartialFC(int(y.max()) + 1, dim, losses.ArcFace(scale=16.0, margin=0.2), sample_rate=0.5)
    optimizers = [torch.optim.SGD(backbone.parameters(), lr=0.05, momentum=0.9), RowSGD(head.parameters(), lr=0.5)]
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(y))
        for start in range(0, len(order) - batch + 1, batch):
            mine = np.sort(np.array_split(order[start : start + batch], world_size)[rank])
            out_of_head = head(backbone(torch.from_numpy(x[mine]).float()), torch.from_numpy(y[mine]).long())
            out_of_head.loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if rank == 0:
            loss, cosine = out_of_head.loss.item(), out_of_head.target_cosine.item()
            print(f"epoch {epoch + 1}  loss {loss:.3f}  target cosine {cosine:.3f}", flush=True)
    centres = head.rows(torch.arange(head.num_classes))  # on every rank: a collective
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        np.save(out / "class_centers.npy", nn.functional.normalize(centres.float(), dim=1).numpy())
        np.save(out / "projection.npy", projection.weight.detach().numpy())
        print(f"{out}: class_centers.npy [{len(centres)}, {dim}], projection.npy [{dim}, {x.shape[1]}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", type=Path, help=".npy [N, D]; default: a small generated set")
    parser.add_argument("--labels", type=Path, help=".npy [N] int64")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dim", type=int, default=32, help="of the projection")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=100, help="over all ranks")
    options = parser.parse_args()
    if (options.embeddings is None) != (options.labels is None):
        parser.error("--embeddings and --labels belong together")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    files = (options.embeddings, options.labels) if options.embeddings else write_sample(options.out)
    train(*files, options.out, options.dim, options.epochs, options.batch)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
