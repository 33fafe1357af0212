"""A manifest as a source: a CSV, TSV or JSON Lines file with an image and its identity in each row.

A record's place is that of its row in the file; reading looks there for the path again, or for the image itself.
"""

from __future__ import annotations

import binascii
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from partialfc.data.convert.fields import BYTES_FIELDS, NO_IDENTITY, NO_IMAGE, Fields, identity_text, require_key
from partialfc.data.convert.image_root import ImageRoot
from partialfc.data.convert.rows import Csv, Format, JsonLines, Row, TextRows
from partialfc.data.convert.source import Record, Skipped, Source, Unreadable, sample_key
from partialfc.data.convert.source_files import file_state, open_file
from partialfc.errors import DataUnavailable, InvalidData

CSV_SUFFIXES, JSON_SUFFIXES = (".csv", ".tsv"), (".jsonl", ".ndjson")

_PART_BYTES = 64 << 20
_DATA_URL = "data:"


@dataclass(frozen=True)
class Manifest(Source):
    """A table of images.

    Attributes:
        path: of the table.
        images: folder of the image files, none of which may lie outside it; None: the folder of the table.
        fields: columns to take. Those called as in ``BYTES_FIELDS`` hold images in base64, others paths; a value that
            begins with ``data:`` is an image in any column.
    """

    path: Path
    images: Path | None = None
    fields: Fields = field(default_factory=Fields)
    kind = "manifest"
    in_blocks = False

    @staticmethod
    def matches(path: Path) -> bool:
        """Return True if a path is called like a manifest."""
        return path.suffix.lower() in (*CSV_SUFFIXES, *JSON_SUFFIXES)

    def fingerprint(self) -> Any:
        """Return name, size and time of the table, and the columns that are taken; image files are not looked at."""
        found = self._format()
        self._root().require()
        return [*file_state(self.path, self.path.parent), str(self.images), repr(found)]

    def parts(self) -> Sequence[tuple[int, int]]:
        """Return ranges of bytes; a CSV is one, since line breaks between quotation marks end no row."""
        found = self._format()
        _, size, _ = file_state(self.path, self.path.parent)
        step = _PART_BYTES if found.splits else max(1, size)
        return [(start, min(start + step, size)) for start in range(found.start, size, step)]

    def list_part(self, part: tuple[int, int]) -> Iterator[Record | Skipped]:
        """Yield the rows that begin in a range of bytes."""
        found, root, (start, stop) = self._format(), self._root(), part
        with open_file(self.path) as file:
            text = TextRows(file, self.path, start, stop)
            if start > found.start:
                text.skip_started()
            for row in found.rows(text):
                try:
                    identity = identity_text(row.label)
                    if identity is None or row.image in (None, ""):
                        yield NO_IDENTITY if identity is None else NO_IMAGE
                        continue
                    key = self._key(row, _is_path(row.image, found), root, text.row_start)
                except ValueError as error:
                    raise text.invalid(error) from error
                yield Record(key, identity, offset=text.row_start, size=text.position - text.row_start)

    def read(self, records: Sequence[Record]) -> Iterator[bytes | Unreadable]:
        """Yield the images."""
        found, root = self._format(), self._root()
        with open_file(self.path) as file:
            for record in records:
                image = self._row(found, file.fileno(), record).image
                if _is_path(image, found):
                    yield root.read(root.relative(image))
                else:
                    yield _from_base64(image)

    def _row(self, found: Format, descriptor: int, record: Record) -> Row:
        try:
            row = os.pread(descriptor, record.size, record.offset)
            return found.parse(row.decode())
        except OSError as error:
            raise DataUnavailable(f"{self.path} cannot be read: {error.strerror}") from error
        except (ValueError, StopIteration, IndexError, AttributeError) as error:
            raise InvalidData(f"{self.path}: the row at byte {record.offset} was changed meanwhile") from error

    def _key(self, row: Row, is_path: bool, root: ImageRoot, place: int) -> str:
        path = root.relative(row.image) if is_path else ""
        if self.fields.key is not None:
            return sample_key(require_key(row.key))
        return sample_key(os.path.splitext(path)[0]) if is_path else f"{place:012d}"

    def _format(self) -> Format:
        kind: type[Csv | JsonLines] = JsonLines if self.path.suffix.lower() in JSON_SUFFIXES else Csv
        return kind.open(self.path, self.fields)

    def _root(self) -> ImageRoot:
        return ImageRoot(self.images or self.path.parent)


def _is_path(image: Any, found: Format) -> bool:
    if not isinstance(image, str):
        raise ValueError(f"column {found.image_field!r} must hold texts, got {type(image).__name__}")
    return not image.startswith(_DATA_URL) and found.image_field.strip().lower() not in BYTES_FIELDS


def _from_base64(text: str) -> bytes | Unreadable:
    """Decode base64, which may be wrapped into lines, or a ``data:`` URL of it."""
    if text.startswith(_DATA_URL):
        start, _, text = text.partition(",")
        if not start.endswith(";base64"):
            return Unreadable("is a data: URL, but not in base64")
    try:
        return binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except ValueError as error:
        return Unreadable(f"is not base64: {error}")
