"""Measure the memory that a rank needs for the backbone, under ddp and under each ZeRO stage of DeepSpeed.

    python benchmarks/zero_memory.py --model iresnet50 --ranks 2      # two minutes

Each engine has its own processes, which train three steps of two micro-batches of two small images per rank, so that
activations are negligible. Summed are the bytes of all tensors that Python knows, each storage once, after the first
and after the last backward pass of a step; the larger sum is shown. *Optimizer* is its state with the float32 weights
that it updates, where these differ from the weights of the forward pass; *gradients* is the rest, DeepSpeed's buffers
included. *Peak* is the process's largest resident size above its size before the engine was built: allocator and
libraries come on top, and on a CPU all of it is host memory.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from head_step import processor
from torch import Tensor, nn

from partialfc.build.backbone import build_backbone
from partialfc.build.engine import build_engine
from partialfc.config import parse_config
from partialfc.engines.base import Engine
from partialfc.engines.state import ReplicatedBackbone
from partialfc.engines.zero_state import ZeroState
from partialfc.runtime.process import ProcessContext
from partialfc.runtime.stopping import StopRequest

MIB = 2**20
ENGINES: dict[str, dict[str, object]] = {
    "ddp": {"name": "ddp"},
    **{f"ZeRO {stage}": {"name": "deepspeed", "zero_stage": stage} for stage in range(4)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="iresnet50")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="adamw")
    arguments = parser.parse_args()
    print(f"machine: {processor()}, torch {torch.__version__}, {arguments.ranks} ranks of one thread, gloo")
    header = ["weights", "optimizer", "gradients", "sum", "peak"]
    for precision in ("fp32", "bf16"):
        print(f"\n{arguments.model}, {arguments.optimizer}, {precision}; MiB per rank")
        print(f"{'':10}" + "".join(f"{name:>12}" for name in header) + f"{'sum/ddp':>12}", flush=True)
        of_ddp = 0.0
        for name, engine in ENGINES.items():
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(worker, (arguments, engine | {"precision": precision}, folder), nprocs=arguments.ranks)
                parts = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(arguments.ranks)]
            row = torch.stack(parts).max(dim=0).values / MIB  # of the rank that needs most
            of_ddp = of_ddp or float(row[3])
            cells = "".join(f"{float(value):12,.0f}" for value in row)
            print(f"{name:10}{cells}{float(row[3]) / of_ddp:12.2f}", flush=True)


def worker(number: int, arguments: argparse.Namespace, engine: dict[str, object], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = str(number)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=number,
        world_size=arguments.ranks,
        timeout=timedelta(minutes=10),
    )
    config = parse_config(
        {
            "data": {"train": "none", "global_batch_size": 4 * arguments.ranks, "image_size": arguments.image_size},
            "model": {"name": arguments.model, "embedding_dim": 512},
            "optim": {"name": arguments.optimizer, "lr": 1e-4, "accumulation": 2},
            "engine": engine,
        }
    )
    if engine["name"] == "deepspeed":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        __import__("deepspeed")  # its own size does not count here
    process = ProcessContext(number, arguments.ranks, torch.device("cpu"), StopRequest(None))
    torch.manual_seed(0)
    backbone = build_backbone(config, process)
    size = sum(parameter.numel() * parameter.element_size() for parameter in backbone.parameters())
    before = resident("VmRSS") - size
    runner = build_engine(backbone, config, process)
    images = torch.randn(2, 1, arguments.image_size, arguments.image_size)
    found: list[list[float]] = []
    for step in range(3):
        runner.begin_step(1e-4)
        for part in range(2):
            embeddings = runner.forward(images, 4 * arguments.ranks)
            runner.backward(embeddings, torch.randn(2, 512), last=part == 1)
            del embeddings
            if step == 2:
                found.append(held(runner, backbone))
        runner.finish_backward()
        runner.step()
    parts = max(found, key=sum)
    row = [*parts, sum(parts), resident("VmHWM") - before]
    torch.save(torch.tensor(row, dtype=torch.float64), f"{folder}/{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


def held(runner: Engine, backbone: nn.Module) -> list[float]:
    """Return the bytes of weights, of the optimizer's tensors, and of everything else."""
    if isinstance(runner.state, ZeroState):
        pieces = runner.state.kept()
    else:
        assert isinstance(runner.state, ReplicatedBackbone)
        assert runner.state.optimizer is not None
        pieces = [value for state in runner.state.optimizer.state.values() for value in state.values()]
    weights: list[Tensor] = [getattr(parameter, "ds_tensor", parameter) for parameter in backbone.parameters()]
    weights += [parameter.data for parameter in backbone.parameters()]  # small ones ZeRO 3 keeps whole besides
    in_weights, in_optimizer = storages(weights), storages(pieces)
    everything = storages([value for value in gc.get_objects() if isinstance(value, Tensor)])
    optimizer = sum(size for key, size in in_optimizer.items() if key not in in_weights)
    rest = sum(size for key, size in everything.items() if key not in in_weights and key not in in_optimizer)
    return [sum(in_weights.values()), optimizer, rest]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Return bytes by address of the storages of these tensors."""
    found = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu" and not tensor.is_sparse]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def resident(which: str) -> int:
    """Return the bytes of host memory of this process: now (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {which}")


if __name__ == "__main__":
    main()
