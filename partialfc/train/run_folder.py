"""The run folder: config.yaml, state.json, metrics.jsonl, checkpoints/, evaluation/."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from partialfc.config import Config, to_yaml
from partialfc.errors import ConfigError
from partialfc.tracking.atomic import write_atomically
from partialfc.tracking.metrics import MetricsFile
from partialfc.tracking.wandb_run import start_wandb


def read_state(folder: Path) -> dict[str, Any] | None:
    """The run's ``state.json``; None if there is none, or it is not one."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


class RunFolder:
    """What the first rank writes of a run."""

    def __init__(self, config: Config, total_steps: int, step: int) -> None:
        self.path = config.run.dir
        self.path.mkdir(parents=True, exist_ok=True)
        self.total_steps = total_steps
        previous = read_state(self.path)
        self.attempt = previous["attempt"] + 1 if previous and isinstance(previous.get("attempt"), int) else 1
        write_atomically(self.path / "config.yaml", to_yaml(config))
        forget_after(self.path / "metrics.jsonl", step)
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self.metrics.write("event", event="started", attempt=self.attempt, step=step, total_steps=total_steps)
        self.set_state("running", step)
        self.wandb = start_wandb(self.path, config.tracking.wandb, anew=config.checkpoint.resume == "never")

    def set_state(self, state: str, step: int, reason: str = "") -> None:
        """Write state.json: ``running``, ``finished`` or ``failed``."""
        values = {
            "state": state,
            "step": step,
            "total_steps": self.total_steps,
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "updated": round(time.time(), 3),
            "reason": reason,
        }
        write_atomically(self.path / "state.json", json.dumps(values, indent=1) + "\n")

    def close(self) -> None:
        self.metrics.close()
        if self.wandb:
            self.wandb.close()


def record_failure(folder: Path, reason: str) -> None:
    """Write why a run has failed, from a rank that is not the first: the launcher may end the first before it can."""
    state = read_state(folder)
    if state is not None and state.get("state") == "running":
        state |= {"state": "failed", "reason": reason, "updated": round(time.time(), 3)}
        with suppress(OSError):
            write_atomically(folder / "state.json", json.dumps(state, indent=1) + "\n")


def forget_after(metrics: Path, step: int) -> None:
    """Drop the lines on training and evaluation beyond ``step``: these steps are done again. Events stay."""
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    kept = [line for line in lines if _is_kept(line, step)]
    if kept != lines:
        write_atomically(metrics, "".join(f"{line}\n" for line in kept))


def _is_kept(line: str, step: int) -> bool:
    try:
        values = json.loads(line)
    except ValueError:  # a line that a kill has cut off
        return False
    return values.get("kind") == "event" or values.get("step", 0) <= step


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
