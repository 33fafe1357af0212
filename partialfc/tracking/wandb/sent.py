"""Record of the lines of ``metrics.jsonl`` that are rows in W&B, over all attempts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialfc.files import open_append, write_atomically

_NOTE = re.compile(r"(\d+) (train|evaluation|events) (\d+)\n")


@dataclass
class Sent:
    """Position up to which lines were sent, over all attempts.

    A run that resumes from a checkpoint repeats some steps with the same results. Their lines are not sent twice, so a
    step never goes back. Events are never removed from ``metrics.jsonl`` and are counted.
    """

    rows: int = 0  # rows of the history, which number them
    train: int = -1  # last step of each kind
    evaluation: int = -1
    events: int = 0


class SentLog:
    """File in the run folder that holds the line of ``metrics.jsonl`` behind each row of the history: ``17 train 20``.

    A line is recorded before it is sent: every row on the server is recorded, even after a kill.

    Args:
        rows: number of rows on W&B's server, if known. Later records are dropped: their lines are sent again.
    """

    def __init__(self, path: Path, rows: int | None = None) -> None:
        self.sent = Sent()
        kept = ""
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for note in text.splitlines(keepends=True):
            found = _NOTE.fullmatch(note)
            if not found or (rows is not None and int(found[1]) >= rows):  # torn, or not on the server
                break
            kept += note
            self.sent.rows = int(found[1]) + 1
            setattr(self.sent, found[2], int(found[3]))
        self.sent.rows = max(self.sent.rows, rows or 0)
        if kept != text:
            write_atomically(path, kept)
        self._file = open_append(path)

    def add(self, line: dict[str, Any]) -> None:
        """Record ``line`` as the next row."""
        kind = "events" if line["kind"] == "event" else line["kind"]
        value = self.sent.events + 1 if kind == "events" else line["step"]
        self._file.write(f"{self.sent.rows} {kind} {value}\n".encode())


class UnsentLines:
    """Lines of a ``metrics.jsonl`` that W&B does not have yet, as they appear."""

    def __init__(self, path: Path, sent: Sent) -> None:
        self._path, self._file = path, path.open("rb")
        self._partial = b""  # a line whose end is not written yet
        self._events = 0
        self.sent = sent

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the lines that have appeared since the last call. A line counts as sent when the next is requested."""
        while piece := self._file.readline():
            self._partial += piece
            if not piece.endswith(b"\n"):
                return
            text, self._partial = self._partial, b""
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and self._is_new(line):
                yield line
                self._count(line)

    def all_read(self) -> bool:
        """Return True if the file, which another one may have replaced, holds nothing unread."""
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
