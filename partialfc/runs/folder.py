"""The run folder: config.yaml, state.json, metrics.jsonl, checkpoints/, evaluation/."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from partialfc.config import Config, to_yaml
from partialfc.errors import ConfigError
from partialfc.files import FileLock, write_atomically
from partialfc.runs.place import Place
from partialfc.runs.state import STATE, read_state, tell_launcher, write_state
from partialfc.runtime.stopping import StoppedBy
from partialfc.runtime.timings import DEFAULT_TIMINGS
from partialfc.tracking.console import log
from partialfc.tracking.metrics import MetricsFile, read_metrics
from partialfc.tracking.wandb.run import start_wandb

LOCK = ".lock"  # held by the process that trains in the folder


class RunFolder:
    """Writes the run folder, on rank 0. A thread refreshes ``state.json`` every few seconds.

    Args:
        step: first step of this attempt.
        restarts: automatic restarts in a row, this one included, that began at the same step.
        lock: the folder's lock, if the caller holds it already; released by :meth:`close`.
        heartbeat: seconds between updates of ``state.json``.
        samples, skipped_steps: of the run before this attempt.
    """

    def __init__(
        self,
        config: Config,
        total_steps: int,
        step: int,
        restarts: int = 0,
        lock: FileLock | None = None,
        heartbeat: float = DEFAULT_TIMINGS.heartbeat,
        samples: int = 0,
        skipped_steps: int = 0,
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
            self._place = Place(self.path, kept="config.yaml")
        except OSError as error:
            raise _not_writable(self.path, error) from error
        self.metrics.write("event", event="started", attempt=self.attempt, step=step, total_steps=total_steps)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._heartbeat = heartbeat
        self._step = step
        self._seconds_left: float | None = None
        self._last_progress = time.monotonic()
        self.on_lost: Callable[[str], None] = lambda reason: None  # called by a thread, once
        self.set_state("running", step)
        self._endpoint = self._open_endpoint(config, samples, skipped_steps)
        self._thread = threading.Thread(target=self._keep_fresh, name="state", daemon=True)
        self._thread.start()
        self.wandb = start_wandb(self.path, config.tracking.wandb, anew=config.checkpoint.resume == "never")

    def progress(self, step: int, seconds_left: float | None = None) -> None:
        """Record the steps done so far and the time left; written with the next heartbeat."""
        self._step, self._last_progress = step, time.monotonic()
        self._seconds_left = seconds_left if seconds_left is not None else self._seconds_left

    def touch(self) -> None:
        """Record that work continues without completing a step, as in an evaluation."""
        self._last_progress = time.monotonic()

    def require(self) -> None:
        """Raise ConfigError if the folder is no longer in its place."""
        lost = self._place.lost()
        if lost:
            raise ConfigError(f"run.dir: {lost}")

    def set_state(self, state: str, step: int, reason: str = "", stopped_by: StoppedBy | None = None) -> None:
        """Write state.json: ``running``, ``preempted``, ``finished`` or ``failed``.

        Args:
            reason: why the run ended, in words for people.
            stopped_by: who asked a ``preempted`` run to stop.

        Raises:
            ConfigError: the folder is no longer in its place, and ``state`` is not ``failed``.
            OSError: it cannot be written and ``state`` is ``finished``. In any other state that is only a warning: a
                full disk neither ends a run nor hides the reason that it ended.
        """
        with self._lock:
            if state != "running":
                self._closed.set()
            self._step = step
            values = self._values(state, reason, stopped_by)
            if state == "failed" and self._place.lost():
                self._keep_what_is_left(values)
                return
            self.require()
            try:
                write_state(self.path, values)
                tell_launcher(values)
            except OSError as error:
                if state == "finished":
                    raise
                log(f"WARNING: {self.path / STATE} cannot be written ({error.strerror})")

    def _keep_what_is_left(self, values: dict[str, Any]) -> None:
        """Write the state into a folder that was renamed; copy the metrics out of one that was removed."""
        with suppress(OSError):
            tell_launcher(values)
            now = self._place.now()
            if now:
                write_state(now, values)
        beside = self.path.absolute()
        kept = self.metrics.rescue(beside.with_name(f"{beside.name}.metrics.jsonl"))
        if kept:
            log(f"the metrics of {self.path} are kept in {kept}")

    def has_evaluation(self, step: int) -> bool:
        """Return True if metrics.jsonl holds the evaluation of ``step``."""
        lines = read_metrics(self.metrics.path)
        return any(line["kind"] == "evaluation" and line.get("step") == step for line in lines)

    def close(self) -> None:
        """Stop writing and release the folder."""
        self._closed.set()
        self._thread.join(self._heartbeat)
        if self._endpoint:
            self._endpoint.close()
        self.metrics.close()
        self._place.close()
        self._folder_lock.release()
        if self.wandb:
            self.wandb.close()

    def _open_endpoint(self, config: Config, samples: int, skipped_steps: int) -> Any:
        port = config.tracking.metrics_port
        if not port:
            return None
        from partialfc.tracking.http import Endpoint
        from partialfc.tracking.prometheus import RunBegin

        def state() -> dict[str, Any]:
            since = time.monotonic() - self._last_progress
            return {**self._values("running"), "seconds_since_progress": round(since, 3)}

        try:
            begin = RunBegin(self.start_step, samples, skipped_steps)
            endpoint = Endpoint(port, self.path.resolve().name, begin, state, 2 * config.run.timeout)
        except OSError as error:  # no reason not to train
            log(f"WARNING: tracking.metrics_port={port} cannot be served: {error.strerror}")
            return None
        self.metrics.listeners.append(endpoint.record)
        log(f"serving /healthz and /metrics on 127.0.0.1:{port}")
        return endpoint

    def _values(self, state: str, reason: str = "", stopped_by: StoppedBy | None = None) -> dict[str, Any]:
        return {
            "state": state,
            "step": self._step,
            "total_steps": self.total_steps,
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "updated": round(time.time(), 3),
            "reason": reason,
            "stopped_by": stopped_by,
            "seconds_left": None if self._seconds_left is None or state != "running" else round(self._seconds_left),
            "start_step": self.start_step,
            "restarts": self.restarts,
        }

    def _keep_fresh(self) -> None:
        while not self._closed.wait(self._heartbeat):
            lost = self._place.lost()
            if lost:
                self.on_lost(lost)
                return
            with self._lock, suppress(OSError):  # a full disk must not end the thread
                state = read_state(self.path)
                if state and state.get("state") == "failed" and state.get("attempt") == self.attempt:
                    return  # written by another rank; this one is about to fail, too
                if not self._closed.is_set():
                    write_state(self.path, self._values("running"))


def lock_folder(config: Config) -> FileLock:
    """Create the run folder and lock it for as long as this process lives.

    A restarted run may find its predecessor about to end, so it waits up to ``run.timeout`` seconds.

    Raises:
        ConfigError: the folder cannot be written, or another process holds it.
    """
    folder, timeout = config.run.dir, config.run.timeout
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
    except OSError as error:
        raise _not_writable(folder, error) from error
    if not lock.acquire(timeout, on_wait=lambda: log(f"waiting for the process that trains in {folder} to end")):
        lock.release()
        raise ConfigError(
            f"run.dir: another process trains in {folder} and has not ended within {timeout:g} s "
            "(state.json names its host and pid); stop it, or choose another run.dir"
        )
    if lock.unsupported:
        log(f"WARNING: {lock.path} cannot be locked ({lock.unsupported}); start one run in this folder at a time")
    return lock


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"run.dir: {folder} cannot be written: {error}")


def forget_after(metrics: Path, step: int) -> None:
    """Drop training and evaluation lines beyond ``step``, from which the run resumes; keep events."""
    try:
        # A kill or a lost disk block may have cut a line in the middle of a character.
        text = metrics.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    kept = "".join(f"{line}\n" for line in text.split("\n") if _is_kept(line, step))
    if kept != text:
        write_atomically(metrics, kept)


def _is_kept(line: str, step: int) -> bool:
    try:
        values = json.loads(line)
    except ValueError:  # cut off by a kill
        return False
    if not isinstance(values, dict):
        return False
    of = values.get("step", 0)
    return values.get("kind") == "event" or (isinstance(of, int) and of <= step)
