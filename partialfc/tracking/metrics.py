"""metrics.jsonl: one JSON object a line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends lines ``{"kind": …, "time": …, …}``; written through at once, so that a killed run loses none.

    Kinds: ``train`` (means over the steps since the last such line), ``evaluation``, ``event``.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        """Append one line. Numbers that JSON cannot hold (NaN, Inf) are written as null."""
        line = {"kind": kind, "time": round(time.time(), 3), **_jsonable(values)}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def add_event(run: Path, event: str, **values: Any) -> None:
    """Write an event into the metrics.jsonl of a run folder, if it is one, from outside its training."""
    path = run / "metrics.jsonl"
    if path.exists():
        metrics = MetricsFile(path)
        metrics.write("event", event=event, **values)
        metrics.close()


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value
