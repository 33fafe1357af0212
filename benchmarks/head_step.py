"""Time and memory of a head step, beside a plain PyTorch version and beside its bare GEMMs.

    python benchmarks/head_step.py --classes 1000000 --dim 512 --batch 256 --rate 0.1 --ranks 2

Every rank is a process with one thread; all three run in the same processes and take turns, so that the ratios hold on
a shared machine. A step is forward, backward and the optimizer's update (SGD with momentum and weight decay).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from partialfc import PartialFC, RowSGD, losses

SCALE, MARGIN = 64.0, 0.5


class PlainHead:
    """Step of typical research code: gather, index the sampled rows, full logits, autograd, a dense optimizer."""

    def __init__(self, classes: int, dim: int, rate: float, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.start = rank * math.ceil(classes / world_size)
        self.stop = min(classes, self.start + math.ceil(classes / world_size))
        self.rate = rate
        self.weight = torch.nn.Parameter(torch.randn(self.stop - self.start, dim) * 0.01)
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1, momentum=0.9, weight_decay=5e-4)

    def step(self, embeddings: Tensor, labels: Tensor) -> None:
        batch = len(embeddings)
        gathered = [torch.empty_like(embeddings) for _ in range(self.world_size)]
        gathered_labels = [torch.empty_like(labels) for _ in range(self.world_size)]
        dist.all_gather(gathered, embeddings.detach())
        dist.all_gather(gathered_labels, labels)
        x = torch.cat(gathered).requires_grad_()
        y = torch.cat(gathered_labels) - self.start
        mine = (y >= 0) & (y < len(self.weight))
        weight: Tensor = self.weight
        if self.rate < 1:
            chance = torch.rand(len(self.weight))
            chance[y[mine]] = 2.0
            rows = chance.topk(int(self.rate * len(self.weight))).indices.sort().values
            y = torch.where(mine, torch.searchsorted(rows, y), -1)
            weight = self.weight[rows]
        logits = F.normalize(x) @ F.normalize(weight).T
        own = mine.nonzero().flatten()
        target = logits[own, y[own]]
        with_margin = torch.cos(torch.acos(target.clamp(-1 + 1e-7, 1 - 1e-7)) + MARGIN)
        logits = SCALE * logits.index_put((own, y[own]), with_margin)
        maximum = logits.detach().amax(1)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        exponentials = torch.exp(logits - maximum[:, None])
        total = exponentials.detach().sum(1)
        dist.all_reduce(total)
        # The shard's part of the loss's gradient: softmax minus one at the target, over the batch.
        probabilities = exponentials.detach() / total[:, None]
        probabilities[own, y[own]] -= 1.0
        logits.backward(probabilities / len(x))
        gradient = x.grad
        assert gradient is not None
        dist.all_reduce(gradient)
        embeddings.grad = gradient[self.rank * batch : (self.rank + 1) * batch]
        self.optimizer.step()
        self.optimizer.zero_grad()


Step = Callable[[], Any]


def measure(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Return median seconds of each step, after two runs to warm up, in turns: a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            dist.barrier()
            started = time.perf_counter()
            step()
            dist.barrier()
            if repeat >= 2:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def peak_extra_mib(step: Callable[[], Any]) -> float | None:
    """Return the peak increase of resident memory during ``step``; None if the system does not report it."""
    status = Path("/proc/self/status")
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None

    def kib(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    ctypes.CDLL(None).malloc_trim(0)  # memory freed by earlier steps must not hide what this one takes
    before = kib("VmRSS")
    step()
    return (kib("VmHWM") - before) / 1024


Timing = tuple[float, float | None]  # seconds, peak extra MiB


def our_step(arguments: argparse.Namespace, embeddings: Tensor, labels: Tensor) -> Step:
    """A step of PartialFC and RowSGD."""
    loss = losses.ArcFace(SCALE, MARGIN)
    head = PartialFC(
        arguments.classes, arguments.dim, loss, sample_rate=arguments.rate, memory_budget_mb=arguments.budget
    )
    optimizer = RowSGD(head.parameters(), lr=0.1)

    def step() -> None:
        embeddings.grad = None
        head(embeddings, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare_gemms(arguments: argparse.Namespace) -> Step:
    """The three products that every exact step needs: logits, the embeddings' gradient, the rows' gradient."""
    active = max(1, int(arguments.rate * arguments.classes / arguments.ranks))
    x, w = torch.randn(arguments.batch, arguments.dim), torch.randn(active, arguments.dim)
    logits, grad_x, grad_w = torch.empty(arguments.batch, active), torch.empty_like(x), torch.empty_like(w)

    def step() -> None:
        torch.mm(x, w.T, out=logits)
        torch.mm(logits, w, out=grad_x)
        torch.mm(logits.T, x, out=grad_w)

    return step


def worker(rank: int, arguments: argparse.Namespace, init_file: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=arguments.ranks)
    local_batch = arguments.batch // arguments.ranks
    embeddings = torch.randn(local_batch, arguments.dim, requires_grad=True)
    labels = torch.randint(0, arguments.classes, (local_batch,))
    steps = {"ours": our_step(arguments, embeddings, labels), "gemms": bare_gemms(arguments)}
    if not arguments.skip_plain:
        plain = PlainHead(arguments.classes, arguments.dim, arguments.rate, rank, arguments.ranks)
        steps["plain"] = partial(plain.step, embeddings, labels)
    seconds = measure(steps, arguments.repeats)
    peaks = {name: peak_extra_mib(step) if name != "gemms" else None for name, step in steps.items()}
    if rank == 0:
        report(arguments, {name: (seconds[name], peaks[name]) for name in steps})
    dist.barrier()
    dist.destroy_process_group()


def report(arguments: argparse.Namespace, timings: dict[str, Timing]) -> None:
    """Print the machine, the sizes, times and ratios, and then all of it as one line of JSON."""
    ours = timings["ours"][0]
    print(f"machine: {processor()}, torch {torch.__version__}, {arguments.ranks} ranks of one thread, gloo, fp32")
    print(
        f"{arguments.classes:,} classes, dim {arguments.dim}, global batch {arguments.batch}, rate {arguments.rate}, "
        f"memory budget {arguments.budget:g} MiB; median of {arguments.repeats} steps"
    )
    print(f"{'':34}{'s/step':>8}{'ratio':>8}{'peak extra MiB per rank':>24}")
    names = {"plain": "(a) plain PyTorch, dense SGD", "ours": "partialfc", "gemms": "(b) the three GEMMs alone"}
    for key, name in names.items():
        if key in timings:
            seconds, peak = timings[key]
            print(f"{name:34}{seconds:8.3f}{seconds / ours:8.2f}{'' if peak is None else f'{peak:24,.0f}'}")
    if "plain" in timings:
        print(f"partialfc is {timings['plain'][0] / ours:.1f}× faster than (a)")
    print(json.dumps({**vars(arguments), **timings}))


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256, help="global batch")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--budget", type=float, default=256, help="memory_budget_mb")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-plain", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (arguments, f"{folder}/init"), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
