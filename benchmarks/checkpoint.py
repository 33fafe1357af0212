"""Measure how long saving a head blocks training, and its total time, beside plain ``torch.save`` of each rank's part.

    python benchmarks/checkpoint.py --classes 1000000 --dim 512 --ranks 2      # 4 GB: weight and momentum

All take turns in the same processes, and count as done when the files are on disk (fsync). ``torch.save`` writes one
file per rank, which loads at the same number of ranks only, without index, digest or protection against a kill. While
the asynchronous save writes, the ranks do small steps of matrix products, one thread each; their slowdown is reported
too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from head_step import processor
from torch import nn
from torch.distributed.tensor import DTensor

from partialfc import PartialFC, RowSGD, losses
from partialfc.checkpoint.state import TrainingState
from partialfc.checkpoint.writer import Saver
from partialfc.engines.state import ReplicatedBackbone

MANIFEST = {"step": 1, "samples": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="a folder on the disk to measure; default: temporary")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        mp.spawn(worker, (arguments, Path(folder)), nprocs=arguments.ranks)


def worker(rank: int, arguments: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=arguments.ranks)
    state = trained_state(arguments)
    size = sum(value.numel() * value.element_size() for value in state.tensors().values())
    if rank == 0:
        print(f"machine: {processor()}, torch {torch.__version__}, {arguments.ranks} ranks of one thread, gloo")
        print(f"{arguments.classes:,} classes of {arguments.dim}, weight and momentum: {size / 1e9:.2f} GB", flush=True)

    def plain() -> tuple[float, float]:
        started = time.perf_counter()
        path = folder / f"plain_{rank}.pt"
        tensors = {
            name: value.to_local() if isinstance(value, DTensor) else value for name, value in state.tensors().items()
        }
        with path.open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        dist.barrier()
        path.unlink()
        return seconds, seconds

    def saved_by(saver: Saver) -> Callable[[], tuple[float, float]]:
        def save() -> tuple[float, float]:
            started = time.perf_counter()
            saver.save(folder / "step-00000001", state.tensors(), MANIFEST)
            stalled = time.perf_counter() - started
            if saver.asynchronous:
                during.extend(small_steps(until=saver))
            saver.wait()
            seconds = time.perf_counter() - started
            for ended in saver.ended():
                if ended.error:
                    raise ended.error
            dist.barrier()
            if rank == 0:
                shutil.rmtree(folder / "step-00000001")
            return stalled, seconds

        return save

    during: list[float] = []
    contenders = {
        "torch.save per rank": plain,
        "partialfc, synchronous": saved_by(Saver(False, saved=int)),
        "partialfc, asynchronous": saved_by(Saver(True, saved=int)),
    }
    undisturbed = small_steps(count=200)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, contender in contenders.items():
            dist.barrier()
            times = torch.tensor(contender())
            dist.all_reduce(times, dist.ReduceOp.MAX)  # the slowest rank's
            found[name].append((float(times[0]), float(times[1])))
    if rank == 0:
        report(found, undisturbed, during)
    dist.destroy_process_group()


def trained_state(arguments: argparse.Namespace) -> TrainingState:
    """Return a head with momentum, after one step."""
    head = PartialFC(arguments.classes, arguments.dim, losses.ArcFace(), sample_rate=0.01)
    backbone = nn.Linear(8, arguments.dim)
    optimizer = RowSGD(head.parameters(), lr=0.1)
    head(backbone(torch.randn(4, 8)), torch.arange(4)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return TrainingState(ReplicatedBackbone(backbone, torch.optim.SGD(backbone.parameters())), head, optimizer)


def small_steps(count: int = 10**9, until: Saver | None = None) -> list[float]:
    """Return the seconds of steps of a few products each: a given number, or as many as run while the saver writes."""
    x = torch.randn(384, 384)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        for _ in range(5):
            x @ x
        times.append(time.perf_counter() - started)
        if until is not None and until.wait(0):
            break
    return times


def report(found: dict[str, list[tuple[float, float]]], undisturbed: list[float], during: list[float]) -> None:
    print(f"{'seconds, median (first round)':32}{'training waits':>20}{'in all':>20}")
    medians = {}
    for name, rounds in found.items():
        stalled, total = zip(*rounds, strict=True)
        medians[name] = statistics.median(stalled), statistics.median(total)
        cells = [f"{statistics.median(times):.2f} ({times[0]:.2f})" for times in (stalled, total)]
        print(f"{name:32}" + "".join(f"{cell:>20}" for cell in cells))
    plain, ours = medians["torch.save per rank"], medians["partialfc, asynchronous"]
    print(
        f"training waits {plain[0] / ours[0]:.1f}× less than for torch.save; in all {ours[1] / plain[1]:.2f}× its time"
    )
    quantiles = [statistics.median(undisturbed), statistics.median(during), max(undisturbed), max(during)]
    print(
        "a small step: {:.1f} ms undisturbed, {:.1f} ms while it writes; longest {:.0f} and {:.0f} ms".format(
            *(1e3 * value for value in quantiles)
        )
    )


if __name__ == "__main__":
    main()
