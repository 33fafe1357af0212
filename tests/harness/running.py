"""Runs that tests start, watch and disturb: real processes under a real torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from partialfc.tracking.metrics import read_metrics

# Scripts of the tests' own find the package beside them, too, wherever it may be installed.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
TRAIN = ["-m", "partialfc", "train"]


def torchrun(ranks: int, *options: str) -> list[str]:
    where = [] if any(option.startswith("--rdzv") for option in options) else ["--standalone"]
    return [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(ranks), *options]


def command(config: Path, ranks: int, *overrides: str) -> list[str]:
    """``ranks=0`` is a single process without torchrun."""
    launcher = [sys.executable] if ranks == 0 else torchrun(ranks)
    return [*launcher, *TRAIN, str(config), *overrides]


def run(config: Path, ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    return finish(command(config, ranks, *overrides))


def finish(words: list[str], seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=seconds, check=False)


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    if not (folder / "metrics.jsonl").exists():
        return []
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == kind]


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in lines(folder, "event") if line["event"] == name]


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return found


def children(pid: int) -> list[int]:
    """All processes below ``pid``, parents first."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *children(int(child))]
    return found


def workers(pid: int) -> list[int]:
    """The ranks that the torchrun ``pid`` has started, in order; loader processes and helpers are none."""
    found = {}
    for child in children(pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            environment = dict(word.split(b"=", 1) for word in words if b"=" in word)
            parent = int(Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[1])
            if b"RANK" in environment and parent == pid:
                found[int(environment[b"RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def wait_until(condition: Any, seconds: float = 90, of: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not happened in time"
        assert of is None or of.poll() is None, "the run has ended by itself"
        time.sleep(0.02)


@contextlib.contextmanager
def started(words: list[str], output: Path) -> Iterator[subprocess.Popen[str]]:
    """A command in the background, its output in a file; whatever is left of it is killed."""
    with output.open("a") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
        below: list[int] = []
        try:
            yield process
        finally:
            below = children(process.pid)
            for pid in (*below, process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(30)


def steps_done(folder: Path) -> int:
    """The step of the last train line; torn lines and missing files are no step."""
    return max((line["step"] for line in lines(folder, "train")), default=0)
