"""RecordIO files as MXNet writes them, from its description; for sizes and faults that the genuine ones lack."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

MAGIC = struct.pack("<I", 0xCED7230A)


def part(data: bytes, kind: int = 0, length: int | None = None) -> bytes:
    word = kind << 29 | (len(data) if length is None else length)
    return MAGIC + struct.pack("<I", word) + data + bytes(-len(data) % 4)


def content(image: bytes, label: float | list[float], flag: int | None = None) -> bytes:
    """Return the content of a record: header, further labels, image."""
    vector = label if isinstance(label, list) else []
    scalar = 0.0 if isinstance(label, list) else label
    header = struct.pack("<IfQQ", len(vector) if flag is None else flag, scalar, 0, 0)
    return header + struct.pack(f"<{len(vector)}f", *vector) + image


def record(image: bytes, label: float | list[float]) -> bytes:
    """Return a record, split where the magic number stands at a multiple of four."""
    data = content(image, label)
    pieces, start = list[bytes](), 0
    for place in range(0, len(data) - 3, 4):
        if data[place : place + 4] == MAGIC and place >= start:
            pieces.append(data[start:place])
            start = place + 4
    pieces.append(data[start:])
    if len(pieces) == 1:
        return part(data)
    kinds = [1, *[2] * (len(pieces) - 2), 3]
    return b"".join(part(piece, kind) for piece, kind in zip(pieces, kinds, strict=True))


def write_rec(folder: Path, records: Iterable[bytes], index: bool = True) -> Path:
    """Write records and, with keys from 0, their ``.idx``; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    place, lines = 0, list[str]()
    with open(folder / "train.rec", "wb") as file:
        for key, data in enumerate(records):
            file.write(data)
            lines.append(f"{key}\t{place}\n")
            place += len(data)
    if index:
        (folder / "train.idx").write_text("".join(lines))
    return folder
