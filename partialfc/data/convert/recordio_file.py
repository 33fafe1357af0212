"""The bytes of a ``.rec``: records found, measured and taken apart; nothing in the file is trusted.

A ``.rec`` is a sequence of parts, little-endian: the magic number, a word of 3 bits kind and 29 bits length, the data,
zeros up to a multiple of 4. A record whose data holds the magic number at a multiple of 4 is split there, and the four
bytes are left out. The data of a record is a header of 24 bytes (flag, label, two ids), ``flag`` further float32 labels
and the encoded image.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from partialfc.data.convert.source_files import open_file
from partialfc.errors import DataUnavailable, InvalidData

_MAGIC = 0xCED7230A
_MAGIC_BYTES = _MAGIC.to_bytes(4, "little")
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_BEGIN = _PART.size + _HEADER.size + 4  # with the first label of a vector
_FIRST_INEXACT = 1 << 24  # float32 holds all integers below
_MAX_EXTENT = 1 << 32


@dataclass(frozen=True, slots=True)
class Described:
    """What a record's header says.

    Attributes:
        label: its class; -1 in a record of InsightFace's own index, which has no image.
        extent: bytes from its beginning to the next record.
    """

    label: int
    extent: int


class RecordFile:
    """Context manager of an open ``.rec``.

    Raises:
        DataUnavailable: the file cannot be read.
        InvalidData: a record is damaged; the message names the byte.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_file(path)
        self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def walk(self) -> Iterator[tuple[int, Described]]:
        """Yield the place of each record and what it says, from the first to the end of the file."""
        place = 0
        while place < self.size:
            found = self.describe(place)
            yield place, found
            place += found.extent

    def describe(self, place: int) -> Described:
        """Return label and extent of the record at a byte; reads 36 bytes, unless the record is split."""
        begin = self._read(place, _BEGIN)
        kind, length = self._parse_part(begin, place, first=True)
        extent = _padded(length)
        if kind == _FIRST:
            extent = self._extent_of_split(place, extent)
            data = self.data(place, extent)
            begin, length = bytes(_PART.size) + data[:_BEGIN], len(data)
        flag, image = self._parse_header(begin[_PART.size :], length, place)
        if flag == 0:
            label = struct.unpack_from("<f", begin, _PART.size + 4)[0]
        elif image == length:
            return Described(-1, extent)
        else:
            label = struct.unpack_from("<f", begin, _PART.size + _HEADER.size)[0]
        if not 0 <= label < _FIRST_INEXACT or label != int(label):
            problem = f"label {label:g} is not a class, an integer from 0 to {_FIRST_INEXACT - 1:,}"
            self._fail(place, problem + (" (larger ones are rounded)" if label >= _FIRST_INEXACT else ""))
        return Described(int(label), extent)

    def image(self, place: int, extent: int) -> bytes:
        """Return the encoded image of a record."""
        data = self.data(place, extent)
        return data[self._parse_header(data, len(data), place)[1] :]

    def data(self, place: int, extent: int) -> bytes:
        """Return the content of a record, put together from its parts."""
        stored = self._read(place, extent)
        parts, start = list[bytes](), 0
        while start < extent:
            kind, length = self._parse_part(stored[start : start + _PART.size], place + start, first=not start)
            stop = start + _PART.size + length
            parts.append(stored[start + _PART.size : stop])
            start += _padded(length)
            if (kind in (_WHOLE, _LAST)) != (start == extent):
                break
        if start != extent or len(stored) != extent:
            self._fail(place, f"expected a record of {extent:,} bytes; was the file replaced?")
        return _MAGIC_BYTES.join(parts)

    def _extent_of_split(self, place: int, extent: int) -> int:
        kind = _FIRST
        while kind != _LAST:
            kind, length = self._parse_part(self._read(place + extent, _PART.size), place + extent, first=False)
            extent += _padded(length)
        if extent >= _MAX_EXTENT:
            self._fail(place, f"a record of {extent:,} bytes; expected less than 4 GiB")
        return extent

    def _parse_part(self, begin: bytes, place: int, first: bool) -> tuple[int, int]:
        """Return the kind and the length of the part at a byte, which lies within the file."""
        if place % 4 or len(begin) < _PART.size:
            self._fail(place, "no record can begin here; the file is truncated, or the .idx belongs to another .rec")
        magic, word = _PART.unpack_from(begin)
        kind, length = word >> 29, word & 0x1FFFFFFF
        if magic != _MAGIC:
            self._fail(place, f"expected a record, which begins with {_MAGIC:#x}, got {magic:#x}")
        if kind not in ((_WHOLE, _FIRST) if first else (_MIDDLE, _LAST)):
            self._fail(place, f"expected the {'first' if first else 'next'} part of a record, got kind {kind}")
        if place + _padded(length) > self.size:
            self._fail(place, f"truncated: a part of {length:,} bytes, but the file ends at byte {self.size:,}")
        return kind, length

    def _parse_header(self, data: bytes, length: int, place: int) -> tuple[int, int]:
        """Return the flag of a record, and where its image starts."""
        if length < _HEADER.size:
            self._fail(place, f"expected a header of {_HEADER.size} bytes and an image, got {length} bytes")
        flag = _HEADER.unpack_from(data)[0]
        if _HEADER.size + 4 * flag > length:
            self._fail(place, f"the header tells of {flag:,} labels, the record has {length:,} bytes")
        return flag, _HEADER.size + 4 * flag

    def _read(self, place: int, size: int) -> bytes:
        if place >= self.size:  # an .idx may give numbers that no file has
            return b""
        try:
            return os.pread(self._file.fileno(), size, place)
        except OSError as error:
            raise DataUnavailable(f"{self.path} cannot be read at byte {place:,}: {error.strerror}") from error

    def _fail(self, place: int, problem: str) -> NoReturn:
        raise InvalidData(f"{self.path}: byte {place:,}: {problem}")


def _padded(length: int) -> int:
    return _PART.size + length + -length % 4
