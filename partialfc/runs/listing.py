"""The table of the runs below a folder."""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialfc.errors import ConfigError
from partialfc.runs.state import STATE, parse_state
from partialfc.tracking.console import duration, printable
from partialfc.tracking.metrics import read_last

STALLED_AFTER = 60.0  # seconds without an update of state.json, which a live run writes every few
_DAMAGED = "damaged"  # shown for a state.json that cannot be read
_TAIL = 1 << 20  # bytes at the end of metrics.jsonl that are read


@dataclass(frozen=True)
class Run:
    """A run folder at a glance."""

    folder: Path
    state: str  # as in state.json, or stalled, or damaged
    step: int
    total_steps: int
    attempt: int
    seconds_left: float | None
    silent: float  # seconds since the last update of state.json
    reason: str
    train: dict[str, Any]  # the last line of this kind in metrics.jsonl, or {}
    evaluation: dict[str, Any]  # likewise


def find_runs(folder: Path, now: float | None = None) -> list[Run]:
    """Return all runs at or below ``folder``, the most recently updated first.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; expected a run folder, or one above run folders")
    now = time.time() if now is None else now
    runs = [run for path in sorted(folder.rglob(STATE)) if (run := _read_run(path.parent, now))]
    return sorted(runs, key=lambda run: run.silent)


def _read_run(folder: Path, now: float) -> Run | None:
    lines = read_last(folder / "metrics.jsonl", _TAIL)
    try:
        state = parse_state(folder)
    except FileNotFoundError:  # removed a moment ago
        return None
    except (OSError, ValueError) as error:
        state = _damaged_state(folder, error, lines.get("train", {}))
    silent = max(0.0, now - (_number_of(state, "updated") or 0.0))
    shown = state["state"]
    if shown == "running" and silent > STALLED_AFTER:
        shown = "stalled"
    return Run(
        folder,
        shown,
        int(_number_of(state, "step") or 0),
        int(_number_of(state, "total_steps") or 0),
        int(_number_of(state, "attempt") or 1),
        _number_of(state, "seconds_left") if shown == "running" else None,
        silent,
        str(state.get("reason") or ""),
        lines.get("train", {}),
        lines.get("evaluation", {}),
    )


def _damaged_state(folder: Path, error: OSError | ValueError, train: dict[str, Any]) -> dict[str, Any]:
    """Return what is known without state.json, in its form."""
    updated = None
    with suppress(OSError):
        updated = (folder / STATE).lstat().st_mtime
    why = error.strerror if isinstance(error, OSError) else error
    reason = f"{STATE} cannot be read ({why}); the next start of the run writes it anew"
    return {"state": _DAMAGED, "step": train.get("step"), "updated": updated, "reason": reason}


def _number_of(state: dict[str, Any], name: str) -> float | None:
    """Return a finite number of ``state``, else None: one corrupt file must not hide all other runs."""
    value = state.get(name)
    with suppress(OverflowError):
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None


def describe_runs(folder: Path) -> str:
    """Return the runs below ``folder`` as a table, followed by the reasons of failed, damaged and stalled ones.

    Raises:
        ConfigError: there is no such folder.
    """
    runs = find_runs(folder)
    if not runs:
        return f"no runs below {folder}"
    head = ("run", "state", "step", "done", "ETA", "loss", "cosine", "images/s", "evaluation", "written")
    rows = [head, *([_cell(text) for text in _row(run, folder)] for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    right = {"step", "done", "ETA", "loss", "cosine", "images/s", "written"}
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if name in right else text.ljust(width)
            for text, width, name in zip(row, widths, head, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    notes = [f"{_name(run, folder)}: {run.reason}" for run in runs if run.reason and run.state in ("failed", _DAMAGED)]
    notes += [
        f"{_name(run, folder)}: no update for {duration(run.silent)}; its process or its machine may be lost"
        for run in runs
        if run.state == "stalled"
    ]
    return "\n".join(lines + (["", *map(_cell, notes)] if notes else []))


def watch_runs(folder: Path, every: float) -> None:
    """Print the table every ``every`` seconds, in place on a terminal, until Ctrl-C."""
    start = "\x1b[2J\x1b[H" if sys.stdout.isatty() else ""
    with suppress(KeyboardInterrupt):
        while True:
            print(f"{start}{time.strftime('%Y-%m-%d %H:%M:%S')}\n{describe_runs(folder)}\n", flush=True)
            time.sleep(every)


def _row(run: Run, folder: Path) -> tuple[str, ...]:
    done = run.step / run.total_steps if run.total_steps else 0.0
    return (
        _name(run, folder),
        run.state,
        f"{run.step:,}/{run.total_steps:,}",
        f"{100 * done:.0f}%",
        "" if run.seconds_left is None else duration(run.seconds_left),
        _number(run.train.get("loss"), ".3f"),
        _number(run.train.get("target_cosine"), ".3f"),
        _number(run.train.get("samples_per_s"), ",.0f"),
        _result(run.evaluation, run.step),
        f"{duration(run.silent)} ago",
    )


def _cell(text: str) -> str:
    """Return a text on one line, without the control characters of a file that others have written."""
    return " ".join(printable(text).split())


def _name(run: Run, folder: Path) -> str:
    return str(run.folder.relative_to(folder)) if run.folder != folder else run.folder.name


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""


def _result(evaluation: dict[str, Any], step: int) -> str:
    """Return the first result of an evaluation in a few words, with its step unless that is the run's ``step``."""
    with suppress(AttributeError, KeyError, TypeError, ValueError):  # a corrupt line
        earlier = f" (step {evaluation['step']:,})" if evaluation and evaluation["step"] != step else ""
        for name, found in evaluation.get("results", {}).items():
            if "accuracy" in found:
                return f"{name} accuracy {found['accuracy']:.4f}{earlier}"
            tar = found.get("tar_at_far", {})
            if tar:
                far = min(tar, key=float)
                return f"{name} TAR {tar[far]:.4f} @ FAR {far}{earlier}"
    return ""
