"""Reads what the W&B client wrote: the transaction log of a run, ``run-<id>.wandb``.

The format is LevelDB's log: a file header, then 32 KiB blocks of records ``checksum, length, type, data``, where a long
record is cut into a first, middle and last piece. Each record is a protobuf message.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4


def records(file: Path) -> Iterator[Any]:
    """The records of one transaction log; a torn end is left out."""
    from wandb.proto import wandb_internal_pb2 as messages

    content = file.read_bytes()
    assert content[:4] == b":W&B", "not a transaction log"
    position, pieces = 7, b""
    while position + _HEADER.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:  # too small for another record: padding
            position += left
            continue
        _, length, kind = _HEADER.unpack_from(content, position)
        position += _HEADER.size
        if kind == 0 or position + length > len(content):
            return
        pieces += content[position : position + length]
        position += length
        if kind in (_WHOLE, _LAST):
            yield messages.Record.FromString(pieces)
            pieces = b""


class Logged:
    """All that the client wrote of a run, over its attempts, in order."""

    def __init__(self, run_folder: Path) -> None:
        files = (run_folder / "wandb").glob("*run-*/run-*.wandb")
        # By their time, which follows "run-": attempts may be offline or online.
        self.files = sorted(files, key=lambda path: path.parent.name.removeprefix("offline-"))
        self.ids: list[str] = []
        self.exit_codes: list[int] = []
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.step_metrics: dict[str, str] = {}
        self.preempting = 0
        for file in self.files:
            for record in records(file):
                self._take(record)

    def _take(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.ids.append(record.run.run_id)
            self.project, self.resume, self.run = record.run.project, record.run.resumed, record.run
            self._update(self.config, record.run.config.update)
        elif kind == "config":
            self._update(self.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            self._update(row, record.history.item)
            self.rows.append(row)
        elif kind == "summary":
            self._update(self.summary, record.summary.update)
        elif kind == "artifact":
            self.artifacts.append(record.artifact)
        elif kind == "metric":
            self.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "preempting":
            self.preempting += 1
        elif kind == "exit":
            self.exit_codes.append(record.exit.exit_code)

    @staticmethod
    def _update(target: dict[str, Any], items: Any) -> None:
        for item in items:
            key = "/".join(item.nested_key) if getattr(item, "nested_key", None) else item.key
            target[key] = json.loads(item.value_json)


def assert_whole(rows: list[dict[str, Any]], steps: int, attempts: int) -> None:
    """Every train step once, and neither W&B's own step nor ours goes back."""
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, steps + 1))
    own = [row["_step"] for row in rows]
    assert own == sorted(set(own))
    ours = [row["step"] for row in rows if "step" in row]
    assert ours == sorted(ours)
    assert sum("event/started/attempt" in row for row in rows) == attempts
