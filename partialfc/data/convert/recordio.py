"""RecordIO of MXNet and InsightFace as a source: a ``.rec`` of labelled images, with or without its ``.idx``.

The ``.idx`` is text: a line a record, its key and its byte in the ``.rec``. An InsightFace set has two more kinds of
records, without an image: one that names the range of images, and one for each identity. They are left out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from partialfc.data.convert.image_root import too_large
from partialfc.data.convert.recordio_file import Described, RecordFile
from partialfc.data.convert.source import Record, Skipped, Source, Unreadable, sample_key
from partialfc.data.convert.source_files import file_state, open_file
from partialfc.errors import DataUnavailable, InvalidData
from partialfc.files import read_bounded

_PART_BYTES = 1 << 20  # of an .idx: some 50,000 records
_PIECE = 1 << 20
_MAX_LINE = 64  # bytes of an .idx
_MAX_PROPERTY = 4096  # bytes
_RANGES = Skipped("record without an image (InsightFace's own index)")
_UNNAMED = Skipped("place where the .idx leaves out a part of the .rec or is not in its order")


@dataclass(frozen=True)
class RecordIO(Source):
    """A ``.rec``, and what was written with it.

    Attributes:
        records: the ``.rec``.
        index: the ``.idx``; None: the records are found by walking through the ``.rec``, and their keys count from 0.
        about: InsightFace's ``property``: number of classes, height, width.
    """

    records: Path
    index: Path | None = None
    about: Path | None = None
    kind = "recordio"
    in_blocks = False

    @staticmethod
    def matches(path: Path) -> bool:
        """Return True if a path is a ``.rec`` or a folder with one."""
        return any(path.glob("*.rec")) if path.is_dir() else path.suffix == ".rec"

    @classmethod
    def open(cls, path: Path) -> RecordIO:
        """Return the source for a ``.rec``, or for a folder with one.

        Raises:
            InvalidData: it is no file, or the folder has none, or several and no ``train.rec``.
        """
        if path.is_dir():
            found = sorted(path.glob("*.rec"))
            if len(found) != 1:
                found = [file for file in found if file.name == "train.rec"]
            if not found:
                raise InvalidData(f"{path}: expected a file train.rec, or a single .rec; or name the .rec itself")
            path = found[0]
        if not path.is_file():
            raise InvalidData(f"{path} is no file; expected a .rec, or a folder with one")
        index, about = path.with_suffix(".idx"), path.with_name("property")
        return cls(path, index if index.exists() else None, about if about.exists() else None)

    def fingerprint(self) -> Any:
        """Return name, size and time of modification of each file."""
        folder = self.records.parent
        states = [file_state(path, folder) for path in (self.records, self.index, self.about) if path]
        for name, size, _ in states:
            if size == 0:
                raise InvalidData(f"{folder / name} is empty")
        return states

    def parts(self) -> Sequence[tuple[int, int]]:
        """Return ranges of bytes in the ``.idx``, or a single empty one for a walk through the ``.rec``."""
        if self.index is None:
            return [(0, 0)]
        _, size, _ = file_state(self.index, self.index.parent)
        return [(start, min(start + _PART_BYTES, size)) for start in range(0, size, _PART_BYTES)]

    def num_records(self) -> int | None:
        """Return the number of images that InsightFace's header record tells, if there is one."""
        if self.index is None:
            return None
        with open_file(self.index) as index, RecordFile(self.records) as records:
            begin = _find_key_0(index)
            if begin < 0:
                return None
            _, _, place = next(self._lines(index, begin))
            found = records.describe(place)
            if found.label >= 0:
                return None
            data = records.data(place, found.extent)
        labels = struct.unpack_from("<2f", data, 24) if len(data) == 32 else (0.0,)
        # Above 2**24, float32 has only some of the integers.
        return int(labels[0]) - 1 if 1 <= labels[0] < 1 << 24 else None

    def num_identities(self) -> int | None:
        """Return the number of classes in ``property``."""
        if self.about is None:
            return None
        try:
            numbers = [int(word) for word in read_bounded(self.about, _MAX_PROPERTY).split(b",")]
        except OSError as error:
            raise DataUnavailable(f"{self.about} cannot be read: {error.strerror}") from error
        except ValueError:
            numbers = []
        if len(numbers) != 3 or min(numbers) < 0:
            raise InvalidData(f"{self.about}: expected 'classes,height,width'; mend it, or take it away")
        return numbers[0]

    def list_part(self, part: tuple[int, int]) -> Iterator[Record | Skipped]:
        """Yield the images that a range of the ``.idx`` names, or all of the ``.rec``."""
        with RecordFile(self.records) as records:
            if self.index is None:
                for number, (place, found) in enumerate(records.walk()):
                    yield _record(str(number), place, found)
                return
            with open_file(self.index) as index:
                expected = None if part[0] else 0
                for begin, key, place in self._lines(index, part[0]):
                    if expected not in (None, place):
                        yield _UNNAMED
                    if begin >= part[1]:
                        return
                    found = records.describe(place)
                    expected = place + found.extent
                    yield _record(key, place, found)
                if expected not in (None, records.size):
                    yield _UNNAMED

    def read(self, records: Sequence[Record]) -> Iterator[bytes | Unreadable]:
        """Yield the encoded images, byte for byte."""
        with RecordFile(self.records) as file:
            for record in records:
                yield too_large(record.size) or file.image(record.offset, record.size)

    def _lines(self, index: BufferedReader, start: int) -> Iterator[tuple[int, str, int]]:
        """Yield each line that begins at byte ``start`` or later: its byte, its key and the place of its record."""
        index.seek(max(start - 1, 0))
        begin = max(start - 1, 0)
        if start:
            begin += len(index.readline(_MAX_LINE))
        while line := index.readline(_MAX_LINE):
            key, _, place = line.rstrip().partition(b"\t")
            if not key or not place.isdigit() or len(line) == _MAX_LINE:
                raise InvalidData(f"{self.index}: byte {begin:,}: expected a key, a tab and a number, got {line!r}")
            yield (
                begin,
                key.decode() if key.isdigit() else sample_key(key.decode("utf-8", "surrogateescape")),
                int(place),
            )
            begin += len(line)


def _record(key: str, place: int, found: Described) -> Record | Skipped:
    if found.label < 0:
        return _RANGES
    return Record(key, str(found.label), offset=place, size=found.extent)


def _find_key_0(index: BufferedReader) -> int:
    """Return the byte at which the line of key 0 begins in an ``.idx``; -1 if there is none."""
    begin, before = 0, b"\n"
    while piece := index.read(_PIECE):
        found = (before + piece).find(b"\n0\t")
        if found >= 0:
            return begin - len(before) + found + 1
        begin += len(piece)
        before = piece[-2:]
    return -1
