"""metrics.jsonl: one JSON object a line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from partialfc.tracking.progress import log


class MetricsFile:
    """Appends lines ``{"kind": …, "time": …, …}``; written through at once, so that a killed run loses none.

    Kinds: ``train`` (means over the steps since the last such line), ``evaluation``, ``event``.

    A disk that is full is no reason to end a run: lines wait in memory until it takes them.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, kind: str, **values: Any) -> None:
        """Append one line. Numbers that JSON cannot hold (NaN, Inf) are written as null."""
        line = {"kind": kind, "time": round(time.time(), 3), **_jsonable(values)}
        had_to_wait = bool(self._waiting)
        self._waiting += json.dumps(line, ensure_ascii=False).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not had_to_wait:
                log(f"WARNING: {self._file.name} cannot be written ({error.strerror}); its lines are kept until it can")

    def close(self) -> None:
        self._file.close()


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value
