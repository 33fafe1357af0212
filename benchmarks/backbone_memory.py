"""Parameters, operations and activation memory of the backbones, with and without activation checkpointing.

    python benchmarks/backbone_memory.py --batch 128
    python benchmarks/backbone_memory.py --time iresnet18 --batch 8

Nothing is computed: tensors are torch's fake ones, on which every operation runs with its shapes but without numbers,
as on a CPU. "Peak" is the largest sum of the bytes of all tensors alive at once in forward and backward, fp32, besides
parameters, their gradients, buffers and images. Workspaces of convolution libraries and fragmentation of an allocator
come on top. First, small cases run both this way and with real numbers: their peaks must be equal. GFLOP are those of
one image's forward pass, in convolutions and matrix products, two per multiply-add.

With `--time NAME` that backbone does real steps on one CPU thread, with and without checkpointing in turns; processor
time is reported, since others may use the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from head_step import processor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from partialfc import models
from partialfc.planning.activation_memory import peak_activation_bytes

DIM, CHANNELS = 512, 3


def peak_bytes(name: str, batch: int, image_size: int, again: bool, fake: bool = True) -> int:
    """Peak bytes of a training step's forward and backward."""
    with torch.device("meta"):
        backbone = models.build(name, DIM, CHANNELS, image_size, activation_checkpointing=again)
    return peak_activation_bytes(backbone, (batch, CHANNELS, image_size, image_size), fake=fake)


def flops(name: str, image_size: int) -> tuple[int, int]:
    """Parameters, and operations of one image's forward pass."""
    with torch.device("meta"):
        backbone = models.build(name, DIM, CHANNELS, image_size).eval()
        images = torch.zeros(1, CHANNELS, image_size, image_size)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        backbone(images)
    return sum(parameter.numel() for parameter in backbone.parameters()), counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=112, help="pixels")
    parser.add_argument("--time", default="", metavar="NAME", help="time steps of this backbone instead")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"machine: {processor()}, torch {torch.__version__}; {DIM} dimensions, {arguments.size} pixels")
    if arguments.time:
        measure_time(arguments.time, arguments.batch, arguments.size, arguments.repeats)
        return
    for name in ("iresnet18", "vit_t"):
        for again in (False, True):
            fake, real = (peak_bytes(name, 2, arguments.size, again, how) for how in (True, False))
            print(f"check: {name}, batch 2, checkpointing {again!s:5}: {fake:,} bytes; with real numbers {real:,}")
            assert fake == real
    print(f"{'':20}{'parameters':>12}{'GFLOP':>10}{'peak GiB, batch ' + str(arguments.batch):>26}")
    print(f"{'':20}{'million':>12}{'an image':>10}{'as it is':>13}{'checkpointed':>13}{'share':>8}")
    for name in models.BY_NAME:
        if not name.startswith(("iresnet", "mobilefacenet", "vit")) or "dp005" in name:
            continue
        parameters, operations = flops(name, arguments.size)
        as_it_is, again_ = (peak_bytes(name, arguments.batch, arguments.size, again) for again in (False, True))
        sizes = f"{as_it_is / 2**30:13.2f}{again_ / 2**30:13.2f}{again_ / as_it_is:8.0%}"
        print(f"{name:20}{parameters / 1e6:12.1f}{operations / 1e9:10.2f}{sizes}", flush=True)


def measure_time(name: str, batch: int, image_size: int, repeats: int) -> None:
    """Median seconds of forward and backward."""
    backbones = {again: models.build(name, DIM, CHANNELS, image_size, None, again) for again in (False, True)}
    times: dict[bool, list[float]] = {False: [], True: []}
    images = torch.randn(batch, CHANNELS, image_size, image_size)
    for repeat in range(repeats + 1):
        for again, backbone in backbones.items():
            seconds = step_seconds(backbone, images)
            if repeat > 0:  # the first warms up
                times[again].append(seconds)
    plain, checkpointed = (statistics.median(times[again]) for again in (False, True))
    print(f"{name}, batch {batch}, one thread, median of {repeats}: {plain:.2f} CPU s a forward and backward, ", end="")
    print(f"{checkpointed:.2f} s with checkpointing ({checkpointed / plain:.2f} times)")


def step_seconds(backbone: nn.Module, images: Tensor) -> float:
    started = time.process_time()
    backbone(images).sum().backward()
    return time.process_time() - started


if __name__ == "__main__":
    main()
