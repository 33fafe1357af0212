"""W&B beside a run, seen from the trainer: a process of its own that reads metrics.jsonl and talks to W&B.

The trainer only starts it and tells it the end, so whatever W&B does — a server that is slow, fails or never answers,
a crash of its client — costs the training nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partialfc.errors import MissingDependency
from partialfc.files import write_atomically
from partialfc.tracking.console import log
from partialfc.tracking.wandb.lock import alone

if TYPE_CHECKING:
    from partialfc.config import WandbConfig

# In the run folder's wandb/. UNSENT is there until W&B's server has everything.
ID, SENT, UNSENT, LOG = "id.txt", "sent.txt", "unsent", "tracking.log"
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE = 10.0  # seconds for what does not wait for W&B: starting processes, writing files

# The processes of W&B use the modules of this package that need no torch; its own __init__ would load it.
_WITHOUT_TORCH = (
    "import runpy, sys, types; package = types.ModuleType('partialfc'); package.__path__ = [sys.argv.pop(1)]; "
    "sys.modules['partialfc'] = package; runpy.run_module(sys.argv[1], run_name='__main__')"
)


def light_command(module: str, *arguments: str) -> list[str]:
    """A command that runs a module of this package in a Python without torch."""
    # -P: a folder called wandb in the working directory is not the package.
    return [sys.executable, "-P", "-c", _WITHOUT_TORCH, str(Path(__file__).parent.parent), module, *arguments]


def require_wandb(settings: WandbConfig) -> None:
    """Refuse to start a run that asks for W&B where it is not installed.

    Raises:
        MissingDependency: the client is not installed.
    """
    if settings.mode != "disabled":
        require_client()


def require_client() -> None:
    """As :func:`require_wandb`, whatever the config."""
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder called wandb is found as a package without a file
        raise MissingDependency(
            "W&B's client is not installed: pip install 'partialfc[wandb]', or train with tracking.wandb.mode=disabled"
        )


def run_id(folder: Path, anew: bool = False) -> str:
    """The W&B id of a run: made once and kept in the run folder, so that a restart goes on with the same run.

    In a sweep it is the one that the sweep's agent gives. ``anew`` begins another run.
    """
    path = folder / "wandb" / ID
    path.parent.mkdir(exist_ok=True)
    if anew:
        path.unlink(missing_ok=True)
    of_sweep = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    known = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if known and of_sweep in (None, known):
        return known
    (path.parent / SENT).unlink(missing_ok=True)
    write_atomically(path, f"{of_sweep or secrets.token_hex(4)}\n")
    return run_id(folder)


def start_wandb(folder: Path, settings: WandbConfig, anew: bool = False) -> WandbRun | None:
    """Begin to send a run folder's metrics.jsonl to W&B, if the config asks for it."""
    if settings.mode == "disabled":
        return None
    try:
        return WandbRun(folder, settings, anew)
    except OSError as error:
        log(f"WARNING: W&B: {error}; the run goes on without it")
        return None


def catch_up(folder: Path, settings: WandbConfig) -> None:
    """Send what has been added to the metrics.jsonl of a run that is over. One that is going on does it itself."""
    if settings.mode == "disabled" or not (folder / "wandb" / ID).exists():
        return
    with alone(folder, 0) as nobody_else:
        pass
    run = start_wandb(folder, settings) if nobody_else else None
    if run:
        run.close()


def client_options(folder: Path, settings: WandbConfig, anew: bool = False) -> dict[str, Any]:
    """What W&B's processes are told of a run."""
    return settings.model_dump() | {
        "id": run_id(folder, anew),
        "name": settings.name or folder.resolve().name,
        "shown": str(folder),
        "trainer": os.getpid(),
    }


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started here never get the signals that ask a run to stop: they end after it, not with it.

    A scheduler sends them to every process of a job, so a group or session of their own would not do. A blocked signal
    stays blocked in what they start, from its first moment on; an ignored one would not be until they have got as far.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WandbRun:
    """The processes that follow one run folder."""

    def __init__(self, folder: Path, settings: WandbConfig, anew: bool = False) -> None:
        self._patience = 2 * settings.timeout + 4 * GRACE
        self._sync = f"partialfc runs sync {folder}"
        self._closing = False
        options = client_options(folder, settings, anew)
        (folder / "wandb" / UNSENT).touch()
        with (folder / "wandb" / LOG).open("a") as errors, _signals_held():
            self._process = subprocess.Popen(
                light_command("partialfc.tracking.wandb.supervisor", str(folder.resolve()), json.dumps(options)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # what ends the trainer does not end it: it still has something to say
            )
        threading.Thread(target=self._repeat, name="wandb", daemon=True).start()

    def _repeat(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            log(line.rstrip("\n"))
        if not self._closing:
            log(f"WARNING: W&B: its processes have ended; the run goes on, and can be sent later: {self._sync}")

    def close(self) -> None:
        """Say that nothing more will come, and wait until W&B has taken it or its time is over."""
        assert self._process.stdin is not None
        self._closing = True
        with contextlib.suppress(OSError):  # it has ended by itself
            self._process.stdin.write("end\n")
            self._process.stdin.close()
        try:
            self._process.wait(self._patience)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            log("WARNING: W&B: its client does not come to an end; see tracking.log in the run folder's wandb/")
