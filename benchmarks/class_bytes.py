"""Measure the bytes per class: those that a head and its optimizer keep, and those that a step adds.

    python benchmarks/class_bytes.py --classes 400000 --dim 512 --rate 0.1

Each choice trains a few steps in its own process; resident memory is read before, after, and at the peak of a step. The
last columns invert the arithmetic of `partialfc.planning.memory`: the number of classes that fit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from partialfc.planning.memory import head_memory

CHOICES: dict[str, dict[str, Any]] = {
    "SGD, momentum": {},
    "SGD, decayed rows": {"unsampled_rows": "decayed"},
    "SGD, momentum, center loss": {"center_loss": True},
    "SGD, bf16 momentum": {"state_dtype": "bfloat16"},
    "SGD, bf16 weight and momentum": {"weight_dtype": "bfloat16", "state_dtype": "bfloat16"},
    "AdamW": {"optimizer": "adamw"},
    "AdamW, bf16 weight and moments": {"optimizer": "adamw", "weight_dtype": "bfloat16", "state_dtype": "bfloat16"},
    "row-wise Adagrad": {"optimizer": "adagrad"},
    "row-wise Adagrad, bf16 weight": {"optimizer": "adagrad", "weight_dtype": "bfloat16"},
}

CHILD = """
import ctypes, json, sys, torch
from partialfc import CenterLoss, PartialFC, RowAdagrad, RowAdamW, RowSGD, losses
torch.set_num_threads(1)
classes, dim, rate, budget, choice = json.loads(sys.argv[1])
def kib(field):
    ctypes.CDLL(None).malloc_trim(0)
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
def make(classes):
    head = PartialFC(classes, dim, losses.ArcFace(), sample_rate=rate, memory_budget_mb=budget,
                     weight_dtype=getattr(torch, choice.get("weight_dtype", "float32")),
                     center_loss=CenterLoss() if choice.get("center_loss") else None)
    state_dtype = getattr(torch, choice["state_dtype"]) if "state_dtype" in choice else None
    kind = choice.get("optimizer", "sgd")
    if kind == "sgd":
        unsampled = choice.get("unsampled_rows", "frozen")
        return head, RowSGD(head.parameters(), unsampled_rows=unsampled, state_dtype=state_dtype)
    if kind == "adamw":
        return head, RowAdamW(head.parameters(), state_dtype=state_dtype)
    return head, RowAdagrad(head.parameters())
def step(head, optimizer):
    x = torch.randn(64, dim, requires_grad=True)
    out = head(x, torch.randint(0, head.num_classes, (64,)))
    out.loss.backward(); optimizer.step(); optimizer.zero_grad()
    return out.active_rows
small = make(500)
for _ in range(3):
    step(*small)
before = kib("VmRSS")
head, optimizer = make(classes)
if head.center_loss is not None:
    head.center_loss.centers.add_(0)
active = step(head, optimizer)
for state in optimizer.state.values():  # zeros that no step has written are not resident yet
    for value in state.values():
        value.add_(0)
step(head, optimizer)
kept = kib("VmRSS") - before
open("/proc/self/clear_refs", "w").write("5")
start = kib("VmRSS")
active = step(head, optimizer)
print(json.dumps({"kept": kept * 1024 / classes, "step": (kib("VmHWM") - start) * 1024, "active": active}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=400_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--budget", type=float, default=64.0, help="memory_budget_mb")
    parser.add_argument("--here", type=float, default=24.0, help="GiB of this machine")
    arguments = parser.parse_args()
    print(
        f"dim {arguments.dim}, sample rate {arguments.rate:g}, memory budget {arguments.budget:g} MiB; measured with "
        f"{arguments.classes:,} classes"
    )
    print(f"{'':32}{'bytes per class':>22}{'MiB per step':>22}{'million classes that fit':>28}")
    here, there = f"{arguments.here:g} GiB", "8×141 GB"
    print(f"{'':32}{'planned':>12}{'measured':>10}{'at most':>12}{'measured':>10}{here:>16}{there:>12}")
    for name, choice in CHOICES.items():
        found = measure(arguments, choice)
        plan = head_memory(arguments.dim, **choice, sampled=arguments.rate < 1)
        step = arguments.rate * plan.active * arguments.classes / 2**20 + arguments.budget
        fit = plan.largest_num_classes(arguments.here * 2**30, arguments.rate, arguments.budget) / 1e6
        fit_eight = 8 * plan.largest_num_classes(141e9, arguments.rate) / 1e6
        print(
            f"{name:32}{plan.per_class:12,}{found['kept']:10,.0f}{step:12,.0f}{found['step'] / 2**20:10,.0f}"
            f"{fit:16,.1f}{fit_eight:12,.0f}"
        )


def measure(arguments: argparse.Namespace, choice: dict[str, Any]) -> dict[str, float]:
    """Measure the memory of one choice in its own process."""
    given = json.dumps([arguments.classes, arguments.dim, arguments.rate, arguments.budget, choice])
    done = subprocess.run([sys.executable, "-c", CHILD, given], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
