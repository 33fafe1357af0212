"""metrics.jsonl: one JSON object per line."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from partialfc.files import open_append, open_regular, parse_json
from partialfc.tracking.console import log


class MetricsFile:
    """Appends lines ``{"kind": …, "time": …, …}``, written immediately so that a killed run loses none.

    Kinds: ``train`` (means over the steps since the last such line), ``evaluation``, ``event``. A full disk does not
    end a run: lines are kept in memory until they can be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Callable[[dict[str, Any]], None]] = []  # called with each line
        self._file = open_append(path)
        self._unwritten = b""
        self._lock = threading.Lock()

    def write(self, kind: str, **values: Any) -> None:
        """Append one line. Numbers that JSON cannot represent (NaN, Inf) are written as null."""
        line = {"kind": kind, "time": round(time.time(), 3), **_jsonable(values)}
        with self._lock:
            self._append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            for listener in self.listeners:
                listener(line)

    def _append(self, text: bytes) -> None:
        failed_before = bool(self._unwritten)
        self._unwritten += text
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not failed_before:
                log(f"WARNING: {self.path} cannot be written ({error.strerror}); its lines are kept until it can")

    def rescue(self, target: Path) -> Path | None:
        """Copy the lines beside a run folder that was removed, to ``target`` or a numbered name like it; return where.

        Returns None if the file still has a name somewhere, or cannot be copied.
        """
        try:
            if os.fstat(self._file.fileno()).st_nlink:
                return None
            self._file.seek(0)
            for number in itertools.count(1):
                place = target if number == 1 else target.with_stem(f"{target.stem}-{number}")
                with suppress(FileExistsError), place.open("xb") as copy:
                    shutil.copyfileobj(self._file, copy)
                    return place
        except OSError:
            pass
        return None

    def close(self) -> None:
        self._file.close()


def add_event(run: Path, event: str, **values: Any) -> None:
    """Append an event to the metrics.jsonl in ``run``, if one is there and can be written, from outside training."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return
    try:
        metrics = MetricsFile(path)
    except OSError as error:
        log(f"WARNING: {path} cannot be written ({error.strerror}); it will not mention the {event}")
        return
    metrics.write("event", event=event, **values)
    metrics.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl that have a kind: a kill or a lost disk block may have torn others."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError):
            line = parse_json(text)
            if isinstance(line, dict) and isinstance(line.get("kind"), str):
                lines.append(line)
    return lines


def read_last(path: Path, most: int) -> dict[str, dict[str, Any]]:
    """Return the last line of each kind among the last ``most`` bytes of a metrics.jsonl; {} if there is no file."""
    try:
        with open_regular(path) as file:
            start = max(0, file.seek(0, 2) - most)
            file.seek(start)
            texts = file.read(most).split(b"\n")[1 if start else 0 :]
    except OSError:
        return {}
    found = {}
    for text in texts:
        with suppress(ValueError):
            line = parse_json(text)
            if isinstance(line, dict) and isinstance(line.get("kind"), str):
                found[line["kind"]] = line
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value
