"""Runs that are written to W&B: processes with the real client and no way to any server but the tests' own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from partialfc.config import WandbConfig
from partialfc.tracking.wandb.run import WandbRun
from tests.harness import running
from tests.harness.running import ENVIRONMENT
from tests.harness.wandb_server import Server

KEY = "5ec2e7" * 6 + "abcd"  # 40 characters, as a real one
_TAKEN = socket.socket()
_TAKEN.bind(("127.0.0.1", 0))
DEAD = f"http://127.0.0.1:{_TAKEN.getsockname()[1]}"  # nobody listens there, and nobody else can
LONGER = ["optim.epochs=6", "checkpoint.every=15", "evaluation.every=40"]  # 72 steps


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return an environment without the user's settings, and with no way to any server but the named one."""
    clean = {key: value for key, value in ENVIRONMENT.items() if not key.startswith("WANDB_")}
    (folder / "home").mkdir(exist_ok=True)
    return clean | {"HOME": str(folder / "home"), "WANDB_BASE_URL": DEAD} | more


def online(server: Server) -> dict[str, str]:
    return {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url, "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"}


def train(task: Path, folder: Path, *overrides: str, ranks: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Train in ``folder/run``. All of the output is kept in ``folder``, to be searched for the key."""
    done = running.run(task, ranks, f"run.dir={folder}/run", *overrides, env=environment(folder, **env))
    with (folder / "output.txt").open("a") as file:
        file.write(done.stdout + done.stderr)
    return done


def partialfc(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return running.partialfc(*arguments, env=environment(folder, **env))


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def clients(folder: Path) -> list[int]:
    """Return the process ids of the W&B clients of a run folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words and "partialfc.tracking.wandb.client" in words:
            found.append(int(path.parent.name))
    return found


def client_of(folder: Path) -> int:
    """Return the process id of the one client; there may be none for a moment."""
    wait_for(lambda: len(clients(folder)) == 1, "there is no client")
    return clients(folder)[0]


def processes(folder: Path) -> list[int]:
    """Return all processes that name a run folder; W&B's service has it in its environment only."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            known = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            if str(folder).encode() in known and int(path.name) != os.getpid():
                found.append(int(path.name))
    return found


def kill(folder: Path, *signals: signal.Signals) -> None:
    """Send signals, one after the other, to every process that names a run folder."""
    for number in signals:
        for pid in processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def warnings_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if "WARNING" in line or "Traceback" in line]


def check_key_is_nowhere(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


@contextlib.contextmanager
def training(task: Path, folder: Path, *overrides: str, **env: str) -> Iterator[running.Process]:
    """Train in ``folder/run`` in the background, with the output in ``folder/output.txt``."""
    words = running.command(task, 0, f"run.dir={folder}/run", *overrides)
    with running.started(words, folder / "output.txt", env=environment(folder, **env)) as process:
        yield process


def killed_after(task: Path, folder: Path, rows: int, *overrides: str, **env: str) -> None:
    """Kill a run, and it alone, once it has written ``rows`` train lines; its client then ends by itself."""
    with training(task, folder, *overrides, **env) as process:
        wait_for(lambda: len(running.lines(folder / "run", "train")) >= rows, "the run does not begin")
        process.kill()
        process.wait(30)  # from then on its client is nobody's child, and is not killed with it
    wait_for(lambda: not clients(folder / "run"), "its client does not end")


class Run:
    """Run folder in which this process plays the trainer. ``followed`` starts to send it, as an attempt does."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.path, self.server, self._step = folder / "run", server, 0
        self.path.mkdir()
        (self.path / "config.yaml").write_text("optim: {lr: 0.5}\n")
        self.metrics = self.path / "metrics.jsonl"
        self.metrics.touch()
        self.ends("running")

    def ends(self, state: str) -> None:
        (self.path / "state.json").write_text(json.dumps({"state": state}))

    def followed(self, mode: Literal["online", "offline"] = "online") -> WandbRun:
        return WandbRun(self.path, WandbConfig(mode=mode, timeout=3))

    def followed_from_another_process(self) -> subprocess.Popen[bytes]:
        """Start an attempt that can be killed."""
        program = (
            "import sys, time; from pathlib import Path; from partialfc.config import WandbConfig\n"
            "from partialfc.tracking.wandb.run import WandbRun\n"
            "WandbRun(Path(sys.argv[1]), WandbConfig(mode='online', timeout=3)); time.sleep(60)\n"
        )
        return subprocess.Popen([sys.executable, "-c", program, str(self.path)])

    def train(self, steps: int) -> None:
        with self.metrics.open("a") as file:
            for _ in range(steps):
                self._step += 1
                file.write(json.dumps({"kind": "train", "time": 1.0, "step": self._step, "loss": 0.5}) + "\n")

    def wait_until_sent(self) -> None:
        """Wait until W&B's client has every line; its server need not have it."""
        notes = self.path / "wandb" / "sent.txt"
        wait_for(lambda: notes.exists() and f" train {self._step}\n" in notes.read_text(), "not sent")

    def wait_until_taken(self) -> None:
        wait_for(lambda: self.steps() and self.steps()[-1] == self._step, "the server does not get it")

    def steps(self) -> list[int]:
        """Return the steps that the server has, in its order."""
        for rows in self.server.history.values():
            assert [row["_step"] for row in rows] == list(range(len(rows)))
        return [row["step"] for rows in self.server.history.values() for row in rows]

    def sync(self) -> subprocess.CompletedProcess[str]:
        return partialfc(self.path.parent, "runs", "sync", str(self.path), **online(self.server))
