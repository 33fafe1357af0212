"""Measure an optimizer's step by the share of rows with a gradient, beside torch's dense SGD and SparseAdam.

    python benchmarks/row_optim.py --rows 200000 --dim 256 --rates 0.01,0.1,0.5,1.0

All take turns in one process, on one thread. Gradients are sparse and coalesced, as the head forms them; dense SGD gets
the same gradient as a dense tensor, formed outside the measured time. `decayed` includes bringing the active rows up to
date.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from head_step import processor
from torch import Tensor, nn

from partialfc import RowAdagrad, RowAdamW, RowSGD

Make = Callable[[nn.Parameter], torch.optim.Optimizer]

OPTIMIZERS: dict[str, tuple[Make, torch.dtype]] = {
    "torch SGD, dense": (lambda p: torch.optim.SGD([p], 0.1, 0.9, weight_decay=5e-4), torch.float32),
    "torch SparseAdam": (lambda p: torch.optim.SparseAdam([p], 1e-3), torch.float32),
    "RowSGD frozen": (lambda p: RowSGD([p], 0.1), torch.float32),
    "RowSGD decayed": (lambda p: RowSGD([p], 0.1, unsampled_rows="decayed"), torch.float32),
    "RowSGD bf16": (lambda p: RowSGD([p], 0.1), torch.bfloat16),
    "RowAdamW": (lambda p: RowAdamW([p]), torch.float32),
    "RowAdamW bf16": (lambda p: RowAdamW([p]), torch.bfloat16),
    "RowAdagrad": (lambda p: RowAdagrad([p]), torch.float32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--rates", default="0.01,0.1,0.5,1.0")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rates = [float(rate) for rate in arguments.rates.split(",")]
    print(f"machine: {processor()}, torch {torch.__version__}, one thread")
    print(f"{arguments.rows:,} rows of {arguments.dim}; milliseconds per step, median of {arguments.repeats}")
    print(f"{'share of rows with a gradient':32}" + "".join(f"{rate:>12g}" for rate in rates))
    columns = [measure(arguments.rows, arguments.dim, rate, arguments.repeats) for rate in rates]
    for name in OPTIMIZERS:
        print(f"{name:32}" + "".join(f"{column[name] * 1e3:12.1f}" for column in columns))
    print("ratio of dense SGD's time to RowSGD's:")
    for name in ("RowSGD frozen", "RowSGD decayed"):
        ratios = [column["torch SGD, dense"] / column[name] for column in columns]
        print(f"{name:32}" + "".join(f"{ratio:11.1f}×" for ratio in ratios))


def measure(rows: int, dim: int, rate: float, repeats: int) -> dict[str, float]:
    """Return median seconds of each optimizer's step, after two to warm up."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: nn.Parameter(torch.zeros(rows, dim, dtype=dtype)) for name, (_, dtype) in OPTIMIZERS.items()}
    optimizers = {name: make(parameters[name]) for name, (make, _) in OPTIMIZERS.items()}
    times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for repeat in range(repeats + 2):
        active = (torch.rand(rows, generator=generator) < rate).nonzero().flatten()
        values = torch.randn(len(active), dim, generator=generator)
        for name, optimizer in optimizers.items():
            parameter = parameters[name]
            parameter.grad = gradient(parameter, active, values, dense=name.endswith("dense"))
            started = time.perf_counter()
            optimizer.step()
            if repeat >= 2:
                times[name].append(time.perf_counter() - started)
            parameter.grad = None
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def gradient(parameter: nn.Parameter, rows: Tensor, values: Tensor, dense: bool) -> Any:
    """Return the same gradient, sparse or dense."""
    if dense:
        return torch.zeros_like(parameter).index_add_(0, rows, values)
    if parameter.dtype is torch.bfloat16:
        parameter.grad_dtype = torch.float32
    return torch.sparse_coo_tensor(rows[None], values, parameter.shape, is_coalesced=True, check_invariants=False)


if __name__ == "__main__":
    main()
