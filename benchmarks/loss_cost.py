"""Measure the cost of a head step with each loss, relative to ArcFace.

    python benchmarks/loss_cost.py --classes 100000 --dim 256 --batch 128 --rate 1.0 --ranks 2

All losses run in the same processes and take turns, so that the ratios hold on a shared machine.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.distributed as dist
from head_step import Step, measure, processor
from torch import Tensor

from partialfc import PartialFC, RowSGD, losses

LOSSES: dict[str, losses.Loss] = {
    "ArcFace": losses.ArcFace(),
    "Softmax": losses.Softmax(),
    "Softmax, label smoothing": losses.LabelSmoothing(losses.Softmax()),
    "NormFace": losses.NormFace(),
    "SphereFace": losses.SphereFace(),
    "ASoftmax": losses.ASoftmax(),
    "CosFace": losses.CosFace(),
    "CombinedMargin": losses.CombinedMargin(),
    "SubCenterArcFace, K=3": losses.SubCenterArcFace(sub_centers=3),
    "CurricularFace": losses.CurricularFace(),
    "MVAMSoftmax": losses.MVAMSoftmax(),
    "MagFace": losses.MagFace(),
    "AdaFace": losses.AdaFace(),
    "ElasticArcFace": losses.ElasticArcFace(),
    "ElasticCosFace, plus": losses.ElasticCosFace(plus=True),
    "Circle": losses.Circle(),
    "UCE": losses.UCE(),
    "Focal(ArcFace)": losses.Focal(losses.ArcFace()),
}


def step_of(loss: losses.Loss, arguments: argparse.Namespace, embeddings: Tensor, labels: Tensor) -> Step:
    """Forward, backward and update with ``loss``."""
    head = PartialFC(arguments.classes, arguments.dim, loss, sample_rate=arguments.rate)
    optimizer = RowSGD(head.parameters(), lr=0.0)

    def step() -> None:
        embeddings.grad = None
        head(embeddings, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def worker(rank: int, arguments: argparse.Namespace, init_file: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=arguments.ranks)
    local_batch = arguments.batch // arguments.ranks
    embeddings = (torch.randn(local_batch, arguments.dim) * 30 / arguments.dim**0.5).requires_grad_()
    labels = torch.randint(0, arguments.classes, (local_batch,))
    steps = {name: step_of(loss, arguments, embeddings, labels) for name, loss in LOSSES.items()}
    seconds = measure(steps, arguments.repeats)
    if rank == 0:
        print(f"machine: {processor()}, torch {torch.__version__}, {arguments.ranks} ranks of one thread, gloo, fp32")
        print(
            f"{arguments.classes:,} classes, dim {arguments.dim}, global batch {arguments.batch}, rate "
            f"{arguments.rate}; median of {arguments.repeats} steps"
        )
        print(f"{'':28}{'s/step':>8}{'ratio to ArcFace':>20}")
        for name, taken in seconds.items():
            print(f"{name:28}{taken:8.3f}{taken / seconds['ArcFace']:20.2f}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128, help="global batch")
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (arguments, f"{folder}/init"), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
