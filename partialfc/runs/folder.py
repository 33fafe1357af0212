"""The run folder: config.yaml, state.json, metrics.jsonl, checkpoints/, evaluation/."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from partialfc.config import Config, to_yaml
from partialfc.errors import ConfigError, PartialFCError
from partialfc.files import write_atomically
from partialfc.runs.lock import FolderLock
from partialfc.tracking.console import log
from partialfc.tracking.metrics import MetricsFile, read_metrics
from partialfc.tracking.wandb.run import start_wandb

STATE = "state.json"
_GIVING_UP = "giving up. Start the run by hand to try again"
_HEARTBEAT = 5.0  # seconds between updates of state.json


class GivenUp(PartialFCError):
    """The run was restarted again and again without getting any further."""


def read_state(folder: Path) -> dict[str, Any] | None:
    """The run's ``state.json``; None if there is none, or it is not one."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) else None


class RunFolder:
    """What the first rank writes of a run. A thread keeps ``state.json`` fresh, whatever the run is busy with.

    Args:
        step: at which this attempt begins.
        restarts: automatic restarts in a row, this one included, that have begun at the same step.
        lock: of the folder, if it is held already; released by :meth:`close`.
    """

    def __init__(
        self, config: Config, total_steps: int, step: int, restarts: int = 0, lock: FolderLock | None = None
    ) -> None:
        self.path = config.run.dir
        self._folder_lock = lock or lock_folder(config)
        self.total_steps, self.start_step, self.restarts = total_steps, step, restarts
        previous = read_state(self.path)
        self.attempt = previous["attempt"] + 1 if previous and isinstance(previous.get("attempt"), int) else 1
        try:
            write_atomically(self.path / "config.yaml", to_yaml(config))
            forget_after(self.path / "metrics.jsonl", step)
            self.metrics = MetricsFile(self.path / "metrics.jsonl")
        except OSError as error:
            raise _not_writable(self.path, error) from error
        self.metrics.write("event", event="started", attempt=self.attempt, step=step, total_steps=total_steps)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._step = step
        self._seconds_left: float | None = None
        self._progressed = time.monotonic()
        self.set_state("running", step)
        self._endpoint = self._open_endpoint(config)
        self._thread = threading.Thread(target=self._keep_fresh, name="state", daemon=True)
        self._thread.start()
        self.wandb = start_wandb(self.path, config.tracking.wandb, anew=config.checkpoint.resume == "never")

    def progress(self, step: int, seconds_left: float | None = None) -> None:
        """Say how far the run is; written with the next heartbeat."""
        self._step, self._progressed = step, time.monotonic()
        self._seconds_left = seconds_left if seconds_left is not None else self._seconds_left

    def touch(self) -> None:
        """Say that work goes on, though no step is done: in an evaluation, for instance."""
        self._progressed = time.monotonic()

    def set_state(self, state: str, step: int, reason: str = "") -> None:
        """Write state.json: ``running``, ``preempted``, ``finished`` or ``failed``. Where the disk is full, a run that
        is not finished goes on, or ends with its own reason.
        """
        with self._lock:
            if state != "running":
                self._closed.set()
            self._step = step
            try:
                self._write_state(state, reason)
                _tell_launcher(self._values(state, reason))
            except OSError as error:
                if state == "finished":
                    raise
                log(f"WARNING: {self.path / STATE} cannot be written ({error.strerror})")

    def has_evaluation(self, step: int) -> bool:
        """Whether the results of ``step`` are in metrics.jsonl."""
        return any(line["kind"] == "evaluation" and line["step"] == step for line in read_metrics(self.metrics.path))

    def close(self) -> None:
        """Write nothing more."""
        self._closed.set()
        self._thread.join(_HEARTBEAT)
        if self._endpoint:
            self._endpoint.close()
        self.metrics.close()
        self._folder_lock.release()
        if self.wandb:
            self.wandb.close()

    def _open_endpoint(self, config: Config) -> Any:
        port = config.tracking.metrics_port
        if not port:
            return None
        from partialfc.tracking.http import Endpoint

        def state() -> dict[str, Any]:
            since = time.monotonic() - self._progressed
            return {**self._values("running", ""), "seconds_since_progress": round(since, 3)}

        try:
            endpoint = Endpoint(port, state, 2 * config.run.timeout)
        except OSError as error:  # no reason not to train
            log(f"WARNING: tracking.metrics_port={port} cannot be served: {error.strerror}")
            return None
        self.metrics.listeners.append(endpoint.record)
        log(f"serving /healthz and /metrics on 127.0.0.1:{port}")
        return endpoint

    def _write_state(self, state: str, reason: str) -> None:
        write_atomically(self.path / STATE, json.dumps(self._values(state, reason), indent=1) + "\n")

    def _values(self, state: str, reason: str) -> dict[str, Any]:
        return {
            "state": state,
            "step": self._step,
            "total_steps": self.total_steps,
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "updated": round(time.time(), 3),
            "reason": reason,
            "seconds_left": None if self._seconds_left is None or state != "running" else round(self._seconds_left),
            "start_step": self.start_step,
            "restarts": self.restarts,
        }

    def _keep_fresh(self) -> None:
        while not self._closed.wait(_HEARTBEAT):
            with self._lock, suppress(OSError):  # a full disk must not end the thread
                state = read_state(self.path)
                if state and state.get("state") == "failed" and state.get("attempt") == self.attempt:
                    return  # another rank has said so, and this one will follow
                if not self._closed.is_set():
                    self._write_state("running", "")


def lock_folder(config: Config) -> FolderLock:
    """Make the run folder, and wait for the process that trains in it.

    Raises:
        ConfigError: it cannot be written, or another process keeps it.
    """
    try:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        return FolderLock(config.run.dir, config.run.timeout)
    except OSError as error:
        raise _not_writable(config.run.dir, error) from error


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"run.dir: {folder} cannot be written: {error}")


def count_restarts(config: Config, step: int, automatic: int) -> int:
    """How many automatic restarts in a row have begun at ``step``; ``automatic`` tells how many there were at all.

    Raises:
        GivenUp: more than the config allows.
    """
    previous = read_state(config.run.dir)
    if not automatic or previous is None or _number(previous, "start_step", -1) < step:
        return 0
    restarts = _number(previous, "restarts", 0) + 1
    if restarts > config.run.restarts_without_progress:
        reason = previous.get("reason") or "no reason is known: the process was killed"
        if str(reason).endswith(_GIVING_UP):  # and the launcher has started it again all the same
            raise GivenUp(reason)
        raise GivenUp(
            f"{restarts} restarts in a row have begun at step {step:,} and got no further (last time: {reason}); "
            f"{_GIVING_UP}"
        )
    return restarts


def _number(state: dict[str, Any], name: str, default: int) -> int:
    value = state.get(name)
    return value if isinstance(value, int) else default


def record_failure(folder: Path, reason: str, states: tuple[str, ...] = ("running",)) -> None:
    """Write why a run in one of ``states`` has failed, without its :class:`RunFolder`: the launcher may end the first
    rank before it can.
    """
    state = read_state(folder)
    if state is not None and state.get("state") in states:
        state |= {"state": "failed", "reason": reason, "updated": round(time.time(), 3)}
        with suppress(OSError):
            write_atomically(folder / STATE, json.dumps(state, indent=1) + "\n")
            _tell_launcher(state)


def _tell_launcher(state: dict[str, Any]) -> None:
    """Write how the run is into the file that a launcher has named, too: that of its own start, while ``state.json``
    may already be another's.
    """
    file = os.environ.get("PARTIALFC_STATE_FILE")
    if file:
        write_atomically(Path(file), json.dumps(state, indent=1) + "\n")


def forget_after(metrics: Path, step: int) -> None:
    """Drop the lines on training and evaluation beyond ``step``: these steps are done again. Events stay."""
    try:
        # A kill or a lost disk block may have cut a line in the middle of a letter.
        text = metrics.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    kept = "".join(f"{line}\n" for line in text.split("\n") if _is_kept(line, step))
    if kept != text:
        write_atomically(metrics, kept)


def _is_kept(line: str, step: int) -> bool:
    try:
        values = json.loads(line)
    except ValueError:  # a line that a kill has cut off
        return False
    return isinstance(values, dict) and (values.get("kind") == "event" or values.get("step", 0) <= step)


def finished_before(config: Config, force: bool = False) -> bool:
    """Whether the run folder holds this very run, finished. ``force``, or new classes, train a finished run on.

    Raises:
        ConfigError: it holds a finished run of another config, which would be overwritten.
    """
    state = read_state(config.run.dir)
    if state is None or state.get("state") != "finished":
        return False
    try:
        same = (config.run.dir / "config.yaml").read_text(encoding="utf-8") == to_yaml(config)
    except OSError:
        same = False
    if same:
        return True
    if not force and not config.checkpoint.grow:
        raise ConfigError(
            f"run.dir: {config.run.dir} holds a finished run of another config; choose another run.dir, or remove it, "
            "or pass --force to train it on"
        )
    return False
