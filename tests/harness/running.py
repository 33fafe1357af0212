"""Runs that tests start, watch and disturb: real processes, under a real torchrun where there is more than one rank.

Commands of this Python start warm, as forks of a process that has imported torch and the trainer: see
``warm_server.py``. With ``cold=True`` they start as a user starts them, which takes seconds more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from partialfc.tracking.metrics import read_metrics
from tests.harness import warm

Process = subprocess.Popen[str] | warm.Process

# Scripts of the tests' own find the package beside them, too, wherever it may be installed.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
TRAIN = ["-m", "partialfc", "train"]
TRAIN_HURRIED = [str(Path(__file__).with_name("hurried.py")), "train"]  # ranks that are lost are missed in seconds
#: Modules that runs import; torch imports some of them only on use.
_IMPORTED = (
    "torch._dynamo",
    "torch.distributed.run",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "PIL.PngImagePlugin",
    "partialfc.cli.main",
    "partialfc.exchange.export",
    "partialfc.train.main",
)
_IMPORTED_BY_DEEPSPEED = ("partialfc.engines.deepspeed", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")


def torchrun(ranks: int, *options: str) -> list[str]:
    where = [] if any(option.startswith("--rdzv") for option in options) else ["--standalone"]
    return [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(ranks), *options]


def command(config: Path, ranks: int, *overrides: str) -> list[str]:
    """Return the command of a run; ``ranks=0``: a single process without torchrun."""
    return [*(torchrun(ranks) if ranks else [sys.executable]), *TRAIN, str(config), *overrides]


def run(config: Path, ranks: int, *overrides: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Train to the end; ``ranks`` and ``options`` as for ``finish``."""
    return finish([sys.executable, *TRAIN, str(config), *overrides], ranks=ranks, **options)


def partialfc(*words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command ``partialfc`` with these words; ``options`` as for ``finish``."""
    return finish([sys.executable, "-m", "partialfc", *map(str, words)], **options)


def begin(words: list[str], cold: bool = False, env: dict[str, str] | None = None, **options: Any) -> Process:
    """Start a command in the background; ``options`` are those of ``subprocess.Popen``."""
    env = ENVIRONMENT if env is None else env
    end = words.index("--") if "--" in words else 0  # words before it are for one rank
    words = words[:end] + _last_of_each_key(words[end:])
    if cold or words[0] != sys.executable:
        return subprocess.Popen(words, env=env, text=True, **options)
    deepspeed = "engine.name=deepspeed" in words
    return warm.server(*_IMPORTED, *(_IMPORTED_BY_DEEPSPEED if deepspeed else ()))(words, env=env, **options)


def _last_of_each_key(words: list[str]) -> list[str]:
    """``words`` without the overrides that later ones replace, as a test's own settings do those that it shares."""
    keys = [re.match(r"\w+(\.\w+)+=", word) for word in words]
    names = [key[0] if key else None for key in keys]
    return [word for place, word in enumerate(words) if names[place] is None or names[place] not in names[place + 1 :]]


def finish(words: list[str], seconds: float = 120, ranks: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; ``options`` are those of ``begin``.

    Args:
        ranks: number of ranks, started as torchrun would, but by this process; 0: a single process. As under torchrun,
            the exit code of ranks is 0 or 1, and when one fails, the others are asked to end.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        with ranks_of(words, ranks, stdout=output, stderr=errors, **options) as processes:
            codes = _wait(processes, seconds)
        for file in (output, errors):
            file.seek(0)
        code = int(any(codes)) if ranks else codes[0]
        return subprocess.CompletedProcess(words, code, output.read(), errors.read())


@contextlib.contextmanager
def ranks_of(
    words: list[str], ranks: int, env: dict[str, str] | None = None, **options: Any
) -> Iterator[list[Process]]:
    """Run a command as ``ranks`` ranks, with a store as under torchrun but unsupervised; 0: as one process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks else None
    of_rank = [_as_rank(rank, ranks, store.port) for rank in range(ranks)] if store else [{}]
    env = ENVIRONMENT if env is None else env
    processes = [begin(words, env=env | own, **options) for own in of_rank]
    try:
        yield processes
    finally:
        for process in processes:
            kill_all(process)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _as_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Environment variables of a rank under torchrun, as far as they are read."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    words = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {name: str(value) for name, value in numbers.items()} | words | {"TORCHELASTIC_RESTART_COUNT": "0"}


def _wait(processes: list[Process], seconds: float) -> list[int]:
    """Return the exit codes; once a process fails, the others are asked to end, and killed after some time."""
    deadline, asked = time.monotonic() + seconds, False
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(processes[0].args, seconds)
        if not asked and any(process.poll() for process in processes):
            asked = True
            for process in processes:
                process.terminate()
            deadline = min(deadline, time.monotonic() + 30)
        time.sleep(0.01)
    return [process.wait() for process in processes]


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
    """The ranks that the torchrun ``pid`` has started, in order, without loader processes and helpers."""
    found = {}
    parents = {pid, *(child for child in children(pid) if _parent(child) == pid and _name(child) == "warm-server")}
    for child in children(pid):
        rank = _rank(child)
        if rank is not None and _parent(child) in parents:
            found[rank] = child
    return [found[rank] for rank in sorted(found)]


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0


def _rank(pid: int) -> int | None:
    """By its name a process that has started warm, by its environment any other one."""
    words = []
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    numbers = [word[5:] for word in words if word.startswith(b"RANK=")]
    name = _name(pid)
    return int(name[5:]) if name.startswith("rank-") else int(numbers[0]) if numbers else None


def wait_until(condition: Any, seconds: float = 90, of: Process | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not happened in time"
        assert of is None or of.poll() is None, "the run has ended by itself"
        time.sleep(0.02)


def kill_all(process: Process) -> None:
    """Kill a process and all below it; ended ones are ignored."""
    for pid in (*children(process.pid), process.pid) if process.poll() is None else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(30)


@contextlib.contextmanager
def started(words: list[str], output: Path | None, **options: Any) -> Iterator[Process]:
    """A command in the background, its output in a file; whatever is left of it is killed. ``options`` as ``begin``."""
    with output.open("a") if output else open(os.devnull, "w") as file:
        process = begin(words, stdout=file, stderr=subprocess.STDOUT, **options)
        try:
            yield process
        finally:
            kill_all(process)


def steps_done(folder: Path) -> int:
    """The step of the last train line; torn lines and missing files are no step."""
    return max((line["step"] for line in lines(folder, "train")), default=0)
