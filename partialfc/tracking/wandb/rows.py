"""What a line of metrics.jsonl is called in W&B, and which line each row of its history is.

Each line becomes one row of the run's history: ``train/loss``, ``evaluation/<set>/tar_at_far/1e-3``,
``event/<event>/<field>``. Names hold no dots and no nested values, so that a sweep can ask for any of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialfc.files import write_atomically

_AXES = ("step", "epoch", "samples")
_HIGHER_IS_BETTER = ("accuracy", "tar_at_far/")


def row(line: dict[str, Any]) -> dict[str, Any]:
    """The row of a line, without its step."""
    kind = line["kind"]
    values = {"_timestamp": line["time"]} if isinstance(line.get("time"), int | float) else {}
    if kind == "evaluation":
        return values | dict(_flat(line.get("results", {}), "evaluation/"))
    if kind == "event":
        fields = {key: value for key, value in line.items() if key not in ("kind", "time", "event")}
        return values | dict(_flat(fields, f"event/{line.get('event')}/"))
    axes = {key: line[key] for key in _AXES[1:] if key in line}
    fields = {key: value for key, value in line.items() if key not in ("kind", "time", *_AXES)}
    return values | axes | dict(_flat(fields, f"{kind}/"))


def best(rows: dict[str, Any], so_far: dict[str, float]) -> dict[str, float]:
    """The best values of an evaluation's row and of those before, as ``best/<set>/accuracy``."""
    found = dict(so_far)
    for key, value in rows.items():
        section, _, rest = key.partition("/")
        measure = rest.partition("/")[2]
        if section == "evaluation" and measure.startswith(_HIGHER_IS_BETTER):
            found[f"best/{rest}"] = max(value, found.get(f"best/{rest}", value))
    return found


def table(results: dict[str, dict[str, Any]], step: int) -> tuple[list[str | int], list[list[Any]]]:
    """An evaluation as a table: columns, and a row for each set or protocol."""
    flat = {name: dict(_flat(found, "")) for name, found in results.items()}
    measures = list(dict.fromkeys(key for found in flat.values() for key in found))
    rows = [[step, name, *(found.get(key) for key in measures)] for name, found in flat.items()]
    return ["step", "set", *measures], rows


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{_plain(key)}/")
        elif value is not None:  # NaN in the file: nothing to draw
            yield f"{prefix}{_plain(key)}", value


def _plain(key: str) -> str:
    """``0.001`` as ``1e-3``; other names with ``_`` for dots, which W&B would take for a path."""
    try:
        mantissa, exponent = f"{float(key):e}".split("e")
    except ValueError:
        return key.replace(".", "_")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace(".", "_")


@dataclass
class Sent:
    """How far a run's lines have been handed to W&B, over all attempts.

    A run that goes on from a checkpoint does some steps again, with the same results: their lines are not sent twice,
    so a step never goes back. Events are never taken back from metrics.jsonl and are counted.
    """

    rows: int = 0  # rows of the history, which number them
    train: int = -1  # last step of each kind
    evaluation: int = -1
    events: int = 0


class Notes:
    """Which line of metrics.jsonl each row of the history is, in a file of the run folder: ``17 train 20``.

    A line is noted before W&B's client gets it, so W&B has no row that is not noted, whatever is killed and when.

    Args:
        rows: how many rows W&B's server has, if that is known. Notes of others are dropped: their lines come again.
    """

    def __init__(self, path: Path, rows: int | None = None) -> None:
        self.sent = Sent()
        kept = ""
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for note in text.splitlines(keepends=True):
            found = _NOTE.fullmatch(note)
            if not found or (rows is not None and int(found[1]) >= rows):  # torn, or not there
                break
            kept += note
            self.sent.rows = int(found[1]) + 1
            setattr(self.sent, found[2], int(found[3]))
        self.sent.rows = max(self.sent.rows, rows or 0)
        if kept != text:
            write_atomically(path, kept)
        self._file = path.open("a", encoding="utf-8")

    def add(self, line: dict[str, Any]) -> None:
        """Note that ``line`` is the next row."""
        kind = "events" if line["kind"] == "event" else line["kind"]
        value = self.sent.events + 1 if kind == "events" else line["step"]
        self._file.write(f"{self.sent.rows} {kind} {value}\n")
        self._file.flush()


_NOTE = re.compile(r"(\d+) (train|evaluation|events) (\d+)\n")


class Lines:
    """The lines of a metrics.jsonl that W&B does not have yet, as they appear."""

    def __init__(self, path: Path, sent: Sent) -> None:
        self._path, self._file = path, path.open("rb")
        self._begun = b""  # a line whose end is not written yet
        self._events = 0
        self.sent = sent

    def new(self) -> Iterator[dict[str, Any]]:
        """Those that have come since the last call. Each counts as sent when the next is asked for."""
        while piece := self._file.readline():
            self._begun += piece
            if not piece.endswith(b"\n"):
                return
            text, self._begun = self._begun, b""
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and self._is_new(line):
                yield line
                self._count(line)

    def are_all(self) -> bool:
        """Whether the file, which may be another one by now, holds nothing that has not been read."""
        now = self._path.stat()
        return now.st_ino == os.fstat(self._file.fileno()).st_ino and now.st_size == self._file.tell()

    def _is_new(self, line: dict[str, Any]) -> bool:
        kind, step = line.get("kind"), line.get("step")
        if kind == "event":
            self._events += 1
            return self._events > self.sent.events
        return kind in ("train", "evaluation") and isinstance(step, int) and step > getattr(self.sent, kind)

    def _count(self, line: dict[str, Any]) -> None:
        self.sent.rows += 1
        if line["kind"] == "event":
            self.sent.events = self._events
        else:
            setattr(self.sent, line["kind"], line["step"])
