"""Run the sections one after the other, each within its share of the time.

benchmarks/gpu.sh OUT_DIR [--seconds N] [--small] [SECTION…]
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import ceilings, correctness, kernels, late_errors, memory, nccl, report, speed, trainer, waits
from .measure import Bench, Entries, first_line

LONGEST = 110  # seconds: no section takes more
HANGING = 60  # seconds beyond its share after which a section counts as hanging, and the process ends


@dataclass(frozen=True)
class Section:
    run: Callable[[Bench, Entries], None]
    share: int  # of the time: seconds, if all sections together have 450
    needs_gpu: bool = False

    def share_of(self, bench: Bench) -> int:
        """Its share of the time on this machine."""
        return self.share if bench.cuda or not self.needs_gpu else 0


SECTIONS = {
    "ceilings": Section(ceilings.run, 45),
    "correctness": Section(correctness.run, 65),
    "late_errors": Section(late_errors.run, 10),
    "waits": Section(waits.run, 45, needs_gpu=True),
    "speed": Section(speed.run, 105),
    "kernels": Section(kernels.run, 75, needs_gpu=True),
    "memory": Section(memory.run, 60, needs_gpu=True),
    "nccl": Section(nccl.run, 20),
    "trainer": Section(trainer.run, 25),
}


def main() -> None:
    arguments = parse()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(device, arguments.small or device.type == "cpu", out)
    results: dict[str, Any] = {"machine": report.machine(device), "small": bench.small, "sections": {}, "problems": []}
    if arguments.resume:
        results = json.loads((out / "results.json").read_text())
    end = time.monotonic() + arguments.seconds
    sections = list(arguments.sections or SECTIONS)
    text = ""
    for position, name in enumerate(sections):
        shares = {other: SECTIONS[other].share_of(bench) for other in sections[position:]}
        share = shares[name] / max(sum(shares.values()), 1)
        seconds = min(LONGEST, (end - time.monotonic()) * (max(share, 0.5) if bench.small else share))
        results["sections"][name], problems = run_section(name, bench, seconds)
        results["problems"] += [f"{name}: {problem}" for problem in problems]
        text = report.write(out, results)
        print(f"{name}: {results['sections'][name]['seconds']:.1f} s", flush=True)
        remaining = sections[position + 1 :]
        if remaining and not is_usable(device):
            go_on_in_a_new_process(arguments, end - time.monotonic(), remaining)
    print(text)
    sys.exit(1 if results["problems"] else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=450.0, help="for all sections together")
    parser.add_argument("--small", action="store_true", help="small sizes, as without a GPU")
    parser.add_argument("--resume", action="store_true", help="add to the results that are there")
    arguments = parser.parse_intermixed_args()
    unknown = set(arguments.sections) - SECTIONS.keys()
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return arguments


def run_section(name: str, bench: Bench, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """Run a section and return its findings and problems; no exception leaves it."""
    section = SECTIONS[name]
    if section.needs_gpu and not bench.cuda:
        return {"seconds": 0.0, "skipped": "needs a GPU"}, []
    started = time.monotonic()
    bench.deadline = started + seconds
    entries = Entries(bench)
    found: dict[str, Any] = {}
    faulthandler.dump_traceback_later(seconds + HANGING, exit=True)
    torch.manual_seed(0)
    try:
        section.run(bench, entries)
        bench.wait()
        bench.free()
    except Exception as error:
        found["failed"] = first_line(error)
        found["traceback"] = traceback.format_exc().splitlines()
        entries.problems.append(f"failed: {first_line(error)}")
    faulthandler.cancel_dump_traceback_later()
    took = time.monotonic() - started
    found = {"seconds": round(took, 1), "share": round(seconds, 1), **found, "entries": dict(entries)}
    if entries.details:
        found["details"] = entries.details
    return found, entries.problems


def is_usable(device: torch.device) -> bool:
    """Return True if the device still works: after some kernel errors it is unusable in the same process."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1.0
    except Exception:
        return False


def go_on_in_a_new_process(arguments: argparse.Namespace, seconds: float, sections: list[str]) -> None:
    """Replace this process by one that runs the other ``sections``."""
    print("the device is unusable; continuing in a new process", flush=True)
    options = ["--resume", "--seconds", f"{seconds:.0f}", *(["--small"] if arguments.small else [])]
    os.execv(sys.executable, [sys.executable, "-m", "gpu", str(arguments.out), *options, *sections])


if __name__ == "__main__":
    main()
