"""Compare the numbers of two checkouts of partialfc, to the last digit.

    python benchmarks/same_numbers.py ../before .                        # six minutes of CPU time
    python benchmarks/same_numbers.py ../before --save numbers.json      # keep the numbers of one checkout,
    python benchmarks/same_numbers.py numbers.json .                     # and compare with them later
    python benchmarks/same_numbers.py ../before . --quickstart data/glyphs   # the quick start too
    python benchmarks/same_numbers.py ../before . --only ZeRO            # only runs with this in their name

Small runs use the code of each checkout: the trainer by its command line, under both engines and with each optimizer,
stopped and resumed; the head by itself on one and two ranks, with every loss and option. Compared are all numbers of
metrics.jsonl except times and speeds, the tensors of the last checkpoint, and the head's losses, gradients, weights and
optimizer states, tensors by a digest of their bytes. One line reports each run. Without DeepSpeed, its runs are left
out; at its first use ever it compiles for a minute.

Numbers belong to a machine: another processor or torch rounds differently, and numbers saved there are refused.

Exit codes: 0 all are the same, 1 some differ or a run has failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from same_numbers_trainer import (
    RUNS,
    Line,
    RunFailed,
    head_runs,
    python,
    quick_start,
    source_of,
    trainer_run,
    write_task,
)

Numbers = dict[str, list[Line]]  # by run
Result = Numbers | RunFailed
QUICK_START = "quick start"
ALONE, SHARDED = "head on one rank", "head on two ranks"
_MOST_SHOWN = 3


@dataclass(frozen=True)
class Job:
    """Source of the numbers of one run, or of the many runs of the head, whose names begin with its name."""

    name: str
    task: Path
    glyphs: Path | None
    words: str  # that the runs' names must contain

    def run(self, checkout: Path, folder: Path) -> Result:
        """Return the numbers that a checkout computes, or the reason there are none."""
        folder.mkdir()
        try:
            if self.name == QUICK_START and self.glyphs:
                return {self.name: quick_start(checkout, folder, self.glyphs)}
            if self.name in (ALONE, SHARDED):
                words = "" if self.words in self.name else self.words
                found = head_runs(checkout, folder, 1 if self.name == ALONE else 2, words)
                return {f"{self.name}: {case}": lines for case, lines in found.items()}
            return {self.name: trainer_run(checkout, folder, self.task, self.name.removeprefix("trainer: "))}
        except RunFailed as failure:
            return failure

    def saved(self, numbers: Numbers) -> Numbers:
        """Return the saved numbers that belong to this job."""
        found = {name: lines for name, lines in numbers.items() if f"{name}: ".startswith(f"{self.name}: ")}
        return {name: lines for name, lines in found.items() if self.words in name}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout, or numbers that --save has kept")
    parser.add_argument("new", type=Path, nargs="?", help="the checkout to compare with it")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the numbers of OLD")
    parser.add_argument(
        "--quickstart",
        type=Path,
        metavar="GLYPHS",
        help="the quick start too, on this set, which is drawn if it is missing",
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="only runs that have these words in their name")
    parser.add_argument("--jobs", type=int, default=2, help="how many runs at once")
    arguments = parser.parse_args()
    started, comparing = time.monotonic(), arguments.new is not None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        try:
            here = facts(write_task(work / "task"))
            saved = read_saved(arguments.old, here) if arguments.old.is_file() else None
            if arguments.save and saved is not None:
                raise ValueError("--save keeps the numbers of a checkout, and OLD is a file of them")
            if not arguments.save and not comparing:
                raise ValueError("give two checkouts, or one and --save")
            checkouts = [path for path in (None if saved else arguments.old, arguments.new) if path]
            for checkout in checkouts:
                check_source(checkout, work)
            jobs = all_jobs(work / "task", arguments.quickstart, arguments.only, saved)
            if any(job.name == QUICK_START for job in jobs):
                make_glyphs(checkouts[0], arguments.quickstart, work)
        except (OSError, ValueError, RunFailed) as error:
            parser.exit(2, f"error: {error}\n")
        numbers: Numbers = {}
        whole = True
        verdicts: dict[str, str | None] = {}
        for job, sides in run_all(jobs, checkouts, work, arguments.jobs):
            sides = sides if saved is None else [job.saved(saved), *sides]
            numbers, whole = (numbers | sides[0], whole) if isinstance(sides[0], dict) else (numbers, False)
            for name, verdict in compare(job.name, sides).items():
                print(f"{name}: {verdict or ('same' if comparing else 'done')}", flush=True)
                verdicts[name] = verdict
    if not verdicts:
        parser.exit(2, f"error: no run has {arguments.only!r} in its name\n")
    bad = sum(verdict is not None for verdict in verdicts.values())
    print(f"{len(verdicts)} runs, {bad} not {'the same' if comparing else 'done'}; {time.monotonic() - started:.0f} s")
    if arguments.save and whole:
        arguments.save.write_text(json.dumps({"machine": here, "numbers": numbers}, indent=1) + "\n")
        print(f"{arguments.save}: the numbers of {arguments.old}")
    elif arguments.save:
        print(f"{arguments.save} is not written, since runs of {arguments.old} have failed")
    return 1 if bad else 0


# --- what is compared, and with what ----------------------------------------------------------------------------------


def facts(data: str) -> dict[str, str]:
    """Return the facts, besides the code, that numbers depend on."""
    found = {"python": platform.python_version(), "instructions": torch.backends.cpu.get_cpu_capability(), "data": data}
    for package in ("torch", "numpy", "pillow", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    processor = {name.strip(): value.strip() for name, _, value in lines}
    names = ("model name", "cpu family", "model", "stepping")
    return found | {"processor": ", ".join(processor[name] for name in names if name in processor), "threads": "1"}


def read_saved(path: Path, here: dict[str, str]) -> Numbers:
    """Return the numbers in a file, if they are those of a machine like this one."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.keys() != {"machine", "numbers"}:
        raise ValueError(f"{path} is neither a checkout nor numbers that --save has kept")
    there: dict[str, str] = content["machine"]
    changed = [f"{name} {there.get(name)}, here {here.get(name)}" for name in here if there.get(name) != here[name]]
    if changed:
        raise ValueError(f"{path} is from another machine: {'; '.join(changed)}")
    numbers: Numbers = content["numbers"]
    return numbers


def check_source(checkout: Path, work: Path) -> None:
    """Check that the checkout's own code runs, wherever else the package is installed."""
    found = python(checkout, "-c", "import partialfc; print(partialfc.__file__)", folder=work).strip()
    if not Path(found).is_relative_to(source_of(checkout)):
        raise ValueError(f"not the code of {checkout} would run, but {found}")


def make_glyphs(checkout: Path, glyphs: Path, work: Path) -> None:
    """Draw the quick start's characters, unless they exist."""
    if not (glyphs / "index.json").exists():
        print(f"drawing the characters into {glyphs}", file=sys.stderr, flush=True)
        words = ["data", "glyphs", "--out", str(glyphs.resolve()), "--classes", "2000", "--size", "32"]
        python(checkout, "-m", "partialfc", *words, "--fonts", "small", folder=work, seconds=3600)


# --- runs -------------------------------------------------------------------------------------------------------------


def all_jobs(task: Path, glyphs: Path | None, words: str, saved: Numbers | None) -> list[Job]:
    """Return all requested jobs, the longest first."""
    with_deepspeed = find_spec("deepspeed") is not None
    trainers = [f"trainer: {name}" for name in RUNS if with_deepspeed or "ZeRO" not in name]
    names = [QUICK_START] if glyphs else []
    names = [name for name in (*names, *trainers) if words in name]
    jobs = [Job(name, task, glyphs, words) for name in (*names, SHARDED, ALONE)]
    if saved is not None:
        missing = [job.name for job in jobs if not job.saved(saved)]
        if missing and not words:
            raise ValueError(f"no numbers were saved of: {', '.join(missing)}")
        jobs = [job for job in jobs if job.name not in missing]
    if not jobs:
        raise ValueError(f"nothing to compare has {words!r} in its name")
    return jobs


def run_all(jobs: list[Job], checkouts: list[Path], work: Path, at_once: int) -> Iterator[tuple[Job, list[Result]]]:
    """Yield the results of each job with all checkouts, as they arrive."""
    found: dict[Job, dict[int, Result]] = {job: {} for job in jobs}
    with ThreadPoolExecutor(at_once) as pool:
        runs = {
            pool.submit(job.run, checkout, work / f"{number}-{side}"): (job, side)
            for number, job in enumerate(jobs)
            for side, checkout in enumerate(checkouts)
        }
        for done, run in enumerate(as_completed(runs), start=1):
            job, side = runs[run]
            found[job][side] = run.result()
            print(f"[{done}/{len(runs)}] {job.name} with {checkouts[side]}", file=sys.stderr, flush=True)
            if len(found[job]) == len(checkouts):
                yield job, [found[job][side] for side in range(len(checkouts))]


# --- verdicts ---------------------------------------------------------------------------------------------------------


def compare(job: str, sides: list[Result]) -> dict[str, str | None]:
    """Return the difference in each run of a job, or None; with one side, only its failure."""
    failures = {f"FAILED: {side}" for side in sides if isinstance(side, RunFailed)}
    if failures:
        return {job: "; ".join(sorted(failures))}
    old, new = (side for side in (sides[0], sides[-1]) if isinstance(side, dict))
    return {name: difference(old.get(name), new.get(name)) for name in old | new}


def difference(old: list[Line] | None, new: list[Line] | None) -> str | None:
    """Return the first difference between two runs, and its size; None if they agree."""
    if old is None or new is None:
        return f"DIFFERS: there is none with {'OLD' if old is None else 'NEW'}"
    for before, after in zip(old, new, strict=False):
        if before["where"] != after["where"]:
            return f"DIFFERS: {before['where']} → {after['where']}"
        pairs = [
            (name, *(json.dumps(line["values"].get(name, "nothing")) for line in (before, after)))
            for name in before["values"] | after["values"]
        ]
        words = [f"{name} {first} → {second}" for name, first, second in pairs if first != second]
        if words:
            more = f" and {len(words) - _MOST_SHOWN} more" if len(words) > _MOST_SHOWN else ""
            return f"DIFFERS at {before['where']}: {', '.join(words[:_MOST_SHOWN])}{more}"
    return None if len(old) == len(new) else f"DIFFERS: {len(old)} lines → {len(new)}"


if __name__ == "__main__":
    raise SystemExit(main())
