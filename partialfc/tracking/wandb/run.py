"""W&B beside a run, on the trainer's side: a client process that reads ``metrics.jsonl`` and talks to W&B.

The trainer only starts the process, logs its messages, and announces the end of the run. A server that is slow, fails
or never answers costs training nothing. A client that dies is started again: a scheduler that stops a job signals all
its processes, and SIGTERM and SIGINT always end W&B's own service, and the client with it.
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
from typing import TYPE_CHECKING, Any, BinaryIO

from partialfc.errors import MissingDependency
from partialfc.files import open_append, write_atomically
from partialfc.tracking.console import log
from partialfc.tracking.wandb.lock import client_lock

if TYPE_CHECKING:
    from partialfc.config import WandbConfig

# In the run folder's wandb/. UNSENT exists until W&B's server has every row.
ID, SENT, UNSENT, LOG = "id.txt", "sent.txt", "unsent", "tracking.log"
GRACE = 10.0  # seconds for work that does not wait for W&B: starting processes, writing files
_CLIENTS = 4  # processes, one after the other: stopping a job takes a few signals, not many
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def wants_wandb(settings: WandbConfig) -> bool:
    """Return True if a run with these settings goes to W&B, online or offline."""
    mode = os.environ.get("WANDB_MODE") if settings.mode == "auto" else settings.mode
    return mode != "disabled"


def require_wandb(settings: WandbConfig) -> None:
    """Refuse to start a run that needs W&B's client if that is not installed.

    Raises:
        MissingDependency: W&B's client is not installed.
    """
    if wants_wandb(settings):
        require_client()


def require_client() -> None:
    """Raise unless W&B's client is installed.

    Raises:
        MissingDependency: it is not.
    """
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder called wandb is found as a package without a file
        raise MissingDependency(
            "W&B's client is not installed: pip install 'partialfc[wandb]', or train with tracking.wandb.mode=disabled"
        )


def run_id(folder: Path, anew: bool = False) -> str:
    """Return the W&B id of a run: made once and kept in the run folder, so that a restart continues the same W&B run.

    In a sweep, the sweep's agent assigns it. ``anew`` begins a new W&B run.
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
    """Start sending a run folder's ``metrics.jsonl`` to W&B, if the settings say so."""
    if not wants_wandb(settings):
        if settings.mode == "auto":
            log("W&B: disabled by WANDB_MODE")
        return None
    try:
        return WandbRun(folder, settings, anew)
    except OSError as error:
        log(f"WARNING: W&B: {error}; the run continues without it")
        return None


def sync_pending(folder: Path, settings: WandbConfig) -> None:
    """Send the lines added to a run's ``metrics.jsonl`` after its end.

    A run that is still training sends them itself.
    """
    if not (folder / "wandb" / ID).exists():
        return
    with client_lock(folder) as free:
        pass
    run = start_wandb(folder, settings) if free else None
    if run:
        run.close()


def client_options(folder: Path, settings: WandbConfig, anew: bool = False) -> dict[str, Any]:
    """Return the options of a client process that sends the run in ``folder``."""
    return settings.model_dump() | {
        "id": run_id(folder, anew),
        "name": settings.name or folder.resolve().name,
        "shown": str(folder),
        "limited": True,  # tracking.wandb.timeout limits the time of the server
        "trainer": os.getpid(),
    }


def start_client(folder: Path, options: dict[str, Any], stdin: int, stderr: BinaryIO) -> subprocess.Popen[str]:
    """Start a client process. It writes lines ``WORD TEXT`` to stdout (see :mod:`partialfc.tracking.wandb.client`).

    Args:
        stdin: ``subprocess.PIPE``, on which a line says that the run has ended, or ``DEVNULL`` for one that has.
        stderr: receives the messages of W&B's client.
    """
    package_folder = str(Path(__file__).parents[3])  # this package may be found by way of the working directory
    paths = [package_folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    # -P: a file wandb.py in the working directory must not shadow the package.
    command = [sys.executable, "-P", "-m", "partialfc.tracking.wandb.client", str(folder.resolve())]
    return subprocess.Popen(
        [*command, json.dumps(options)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # signals to the trainer's group must not end it: it still has rows to send
    )


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Block stop signals while a client starts, so that it outlives the run.

    A scheduler sends these signals to every process of a job, so a session of their own is not enough. A blocked signal
    is blocked in a new process from its first moment; ignoring one would start only when the process asks for it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WandbRun:
    """Client process that sends one run folder.

    A client that dies is replaced. If one does not reach its server, or clients keep dying, the run is written offline.
    The log warns once that W&B lacks rows.
    """

    def __init__(self, folder: Path, settings: WandbConfig, anew: bool = False) -> None:
        self._folder = folder
        self._options = client_options(folder, settings, anew)
        self.close_timeout = 2 * settings.timeout + 4 * GRACE  # seconds that close() waits
        self._lock = threading.Lock()  # between the thread, which starts clients, and close()
        self._ended = self._gave_up = False
        self._shown = self._warned = False  # in the trainer's log: where the run is, what W&B lacks
        (folder / "wandb" / UNSENT).touch()
        self._start(settings.mode)
        self._thread = threading.Thread(target=self._attend, name="wandb", daemon=True)
        self._thread.start()

    def _start(self, mode: str) -> None:
        with self._lock, open_append(self._folder / "wandb" / LOG) as errors, _signals_held():
            self._process = start_client(self._folder, self._options | {"mode": mode}, subprocess.PIPE, errors)
            if self._ended:
                self._tell_end()

    def _attend(self) -> None:
        """Log the clients' messages; start another client when one fails."""
        try:
            for clients_left in reversed(range(_CLIENTS)):
                failure, had_begun = self._listen()
                if not failure or self._gave_up:
                    return
                if not had_begun or not clients_left:
                    break
                self._start(self._options["mode"])
            self._warn(failure, "the run continues offline and")
            self._start("offline")
            failure, _ = self._listen()
        except OSError as error:  # no process can be started
            failure = str(error)
        if failure:
            self._warn(failure, "the run continues and")

    def _listen(self) -> tuple[str, bool]:
        """Log the messages of one client until it ends; return its failure ('' if none), and True if it had started."""
        assert self._process.stdout is not None
        failure, had_begun = "its client has died", False
        for line in self._process.stdout:
            word, _, text = line.rstrip("\n").partition(" ")
            if word == "started":
                had_begun = True
                if not self._shown:
                    log(f"W&B: {text}")
                self._shown = True
            elif word == "failed":
                failure = text
            else:
                failure = ""
                if word == "unfinished":
                    self._warn(text, "the rest")
        self._kill()
        return failure, had_begun

    def _warn(self, reason: str, what: str) -> None:
        """Log, once, that W&B does not have everything; its own log has every reason."""
        if not self._warned:
            log(f"WARNING: W&B: {reason}; {what} can be sent later: partialfc runs sync {self._folder}")
        self._warned = self._shown = True

    def _tell_end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has already ended
            self._process.stdin.write("end\n")
            self._process.stdin.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Announce the end of the run, and wait until W&B has every row or the time limit passes."""
        with self._lock:
            self._ended = True
            self._tell_end()
        self._thread.join(self.close_timeout)
        if self._thread.is_alive():
            self._gave_up = True
            self._warn("its client does not end (see wandb/tracking.log in the run folder)", "the rest")
            self._kill()
