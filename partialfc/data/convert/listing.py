"""The records of a source on disk, memory-mapped: their number costs no private memory, and processes share them."""

from __future__ import annotations

import json
import mmap
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from partialfc.data.convert.source import Record, Source
from partialfc.data.pool import Pool
from partialfc.errors import InvalidData
from partialfc.files import open_new, read_json, sync_to_disk, write_atomically
from partialfc.tracking.console import Progress

ROW = np.dtype(
    [
        ("offset", "<u8"),
        ("text", "<u8"),  # place of key and path in the texts, each ended by a zero
        ("file", "<u4"),
        ("size", "<u4"),
        ("identity", "<u4"),  # number of its name
        ("hash", "<u4"),  # CRC-32 of the key
    ]
)

_ROWS, _TEXTS, _NAMES, _SUMMARY = "rows", "texts", "names", "listing.json"
_FILES = _ROWS, _TEXTS, _NAMES
_MAX_NAME_BYTES = 4096  # of an identity; a line of the class table may have 64 KiB
_CHUNK = 1 << 14  # records in memory at a time
_MAX_SUMMARY = 1 << 20


@dataclass(frozen=True)
class Listing:
    """All records of a source, in its order.

    Attributes:
        rows: [num_records] of :data:`ROW`, memory-mapped.
        num_bytes: sum of the sizes.
        skipped: how often each reason to leave something out occurred.
    """

    folder: Path
    rows: npt.NDArray[Any]
    num_identities: int
    num_bytes: int
    skipped: dict[str, int]

    @classmethod
    def open(cls, folder: Path) -> Listing | None:
        """Return the listing in a folder; None if it is not complete, or was damaged since: it can be made again."""
        try:
            summary = read_json(folder / _SUMMARY, _MAX_SUMMARY)
            if _sizes(folder) != summary["sizes"]:
                return None
            rows = np.memmap(folder / _ROWS, ROW, mode="r", shape=(summary["records"],))
            return cls(folder, rows, summary["identities"], summary["bytes"], summary["skipped"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def names(self) -> list[str]:
        """Return the names of the identities, by number."""
        return _read_names(self.folder / _NAMES)

    def records(self, numbers: npt.NDArray[np.int64]) -> list[Record]:
        """Return records by their numbers, without the name of the identity."""
        found = []
        with (
            open(self.folder / _TEXTS, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as texts,
        ):
            for offset, start, number, size, _, _ in self.rows[numbers].tolist():
                middle = texts.find(b"\0", start)
                end = texts.find(b"\0", middle + 1)
                path = texts[middle + 1 : end].decode("utf-8", "surrogateescape")
                found.append(Record(texts[start:middle].decode(), "", path, number, offset, size))
        return found


def make_listing(source: Source, folder: Path, pool: Pool, progress: Progress) -> Listing:
    """List a source into a folder, its parts in parallel.

    Raises:
        InvalidData: it has no records, or as the source.
    """
    parts = source.parts()
    tasks = [(source, part, folder / f"part-{number:06d}") for number, part in enumerate(parts)]
    numbers: dict[str, int] = {}  # of the identities, by name
    skipped: Counter[str] = Counter()
    num_records = num_bytes = 0
    with (
        open_new(folder / _ROWS) as rows,
        open_new(folder / _TEXTS) as texts,
        progress("listing, parts", len(parts)) as advance,
    ):

        def show(records: int) -> None:
            advance(0, note=f"{records:,} images")

        # A single part, which may be all of a large file, is listed here, where its progress can be seen.
        listed = pool.map(_list_part, tasks) if len(tasks) > 1 else (_list_part(*task, show) for task in tasks)
        for (_, _, stem), left_out in zip(tasks, listed, strict=True):
            records, size = _append(stem, rows, texts, numbers)
            num_records, num_bytes = num_records + records, num_bytes + size
            skipped.update(left_out)
            advance(note=f"{num_records:,} images")
    if not num_records:
        raise InvalidData(f"{source.kind}: no images were found{': ' if skipped else ''}{describe_skipped(skipped)}")
    _write_names(folder / _NAMES, numbers)
    for name in _FILES:
        sync_to_disk(folder / name)  # before the summary, which says that they are complete
    summary = {"records": num_records, "identities": len(numbers), "bytes": num_bytes, "skipped": skipped}
    summary["sizes"] = _sizes(folder)
    write_atomically(folder / _SUMMARY, json.dumps(summary))
    listing = Listing.open(folder)
    assert listing is not None
    return listing


def _sizes(folder: Path) -> list[int]:
    return [(folder / name).stat().st_size for name in _FILES]


def describe_skipped(skipped: dict[str, int]) -> str:
    """Return what was left out, in words."""
    return "; ".join(f"{count:,} × {reason}" for reason, count in skipped.items())


def _list_part(
    source: Source, part: Any, stem: Path, show: Callable[[int], None] = lambda records: None
) -> dict[str, int]:
    """Write rows, texts and names of a part's records; identities are numbered as they occur in the part.

    Args:
        show: called now and then with the number of records so far.
    """
    skipped: Counter[str] = Counter()
    numbers: dict[str, int] = {}
    chunk = list[tuple[int, ...]]()
    place = 0
    with open_new(stem.with_suffix(".rows")) as rows, open_new(stem.with_suffix(".texts")) as texts:
        for record in source.list_part(part):
            if not isinstance(record, Record):
                skipped[record.reason] += 1
                continue
            identity = numbers.get(record.identity)
            if identity is None:
                _check_name(record, source.kind)
                identity = numbers[record.identity] = len(numbers)
            key = record.key.encode()
            text = b"%b\0%b\0" % (key, record.path.encode("utf-8", "surrogateescape"))
            texts.write(text)
            chunk.append((record.offset, place, record.file, record.size, identity, zlib.crc32(key)))
            place += len(text)
            if len(chunk) == _CHUNK:
                rows.write(np.array(chunk, ROW).tobytes())
                chunk.clear()
                show(rows.tell() // ROW.itemsize)
        rows.write(np.array(chunk, ROW).tobytes())
    _write_names(stem.with_suffix(".names"), numbers)
    return dict(skipped)


def _check_name(record: Record, kind: str) -> None:
    name = record.identity
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= _MAX_NAME_BYTES or "\0" in name:
        raise InvalidData(
            f"{kind}: sample {record.key!r}: an identity's name must be 1 to {_MAX_NAME_BYTES:,} bytes of text without "
            f"NUL, got {name[:80]!r}"
        )


def _append(stem: Path, rows: BinaryIO, texts: BinaryIO, numbers: dict[str, int]) -> tuple[int, int]:
    """Move a part's files to the end of the whole; return the number of its records and the sum of their sizes."""
    names = _read_names(stem.with_suffix(".names"))
    known = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.uint32)
    num_records, num_bytes, place = 0, 0, texts.tell()
    with open(stem.with_suffix(".rows"), "rb") as file:
        while len(chunk := np.fromfile(file, ROW, _CHUNK)):
            chunk["text"] += np.uint64(place)
            chunk["identity"] = known[chunk["identity"]]
            rows.write(chunk.tobytes())
            num_records += len(chunk)
            num_bytes += int(chunk["size"].sum(dtype=np.int64))
    with open(stem.with_suffix(".texts"), "rb") as file:
        shutil.copyfileobj(file, texts, 1 << 20)
    for suffix in (".rows", ".texts", ".names"):
        stem.with_suffix(suffix).unlink()
    return num_records, num_bytes


def _write_names(path: Path, names: Iterable[str]) -> None:
    path.write_bytes("".join(f"{name}\0" for name in names).encode())


def _read_names(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\0")[:-1]
