"""Rows of a text file: CSV, TSV and JSON Lines, each with the bytes that it takes in the file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, Self

from partialfc.data.convert.fields import Fields
from partialfc.errors import InvalidData
from partialfc.files import open_regular, parse_json

MAX_ROW_BYTES = 64 << 20  # an image of 48 MiB in base64

_PIECE = 1 << 16
_BOM = b"\xef\xbb\xbf"
_OTHER_ENCODINGS = (b"\xff\xfe", b"\xfe\xff")


class Row(NamedTuple):
    """The values of a row that are taken, as they are."""

    image: Any
    label: Any
    key: Any


class TextRows(Iterator[str]):
    """Lines of a UTF-8 file, up to ``stop``; it knows where a row, which may be of several lines, begins and ends."""

    def __init__(self, file: BinaryIO, path: Path, start: int, stop: int) -> None:
        self.path, self.row_start, self.position = path, start, start
        self._file, self._stop = file, stop
        file.seek(start)

    def begin_row(self) -> bool:
        """Begin a row at the current position; return False at the end."""
        self.row_start = self.position
        return self.position < self._stop

    def skip_started(self) -> None:
        """Pass over the rest of a line that begins before the current position."""
        self._file.seek(self.position - 1)
        while self.position <= self._stop:
            rest = self._file.readline(_PIECE)
            self.position += len(rest)
            if not rest or rest.endswith(b"\n"):
                break
        self.position -= 1

    def __next__(self) -> str:
        line = self._file.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        start, self.position = self.position, self.position + len(line)
        if self.position - self.row_start > MAX_ROW_BYTES:
            raise self.invalid(f"more than {MAX_ROW_BYTES:,} bytes; is a quotation mark missing?")
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise InvalidData(f"{self.path}: byte {start + error.start} is not UTF-8") from None

    def invalid(self, problem: object) -> InvalidData:
        """Return the error for the current row."""
        return InvalidData(f"{self.path}: row at byte {self.row_start}: {problem}")


@dataclass(frozen=True)
class Csv:
    """Rows of CSV and TSV, under a header; quotation marks as in RFC 4180.

    Attributes:
        image_field: name of the column of the images.
        start: byte at which the rows begin.
        splits: True if every line break ends a row, so that ranges of bytes can be read apart.
    """

    image_field: str
    start: int
    delimiter: str
    num_columns: int
    image: int
    label: int
    key: int | None
    splits: ClassVar[bool] = False  # there may be line breaks between quotation marks

    @classmethod
    def open(cls, path: Path, fields: Fields) -> Self:
        """Read the header; a ``.csv`` may also have semicolons or tabs."""
        csv.field_size_limit(MAX_ROW_BYTES)
        with _opened(path) as (file, start, size):
            text = TextRows(file, path, start, size)
            header = next(text, "")
            delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
            text = TextRows(file, path, start, size)
            try:
                columns = next(csv.reader(text, delimiter=delimiter, strict=True), [])
            except csv.Error as error:
                raise text.invalid(error) from error
        chosen = fields.resolve(columns, f"{path}: in its first line")
        return cls(
            image_field=chosen.image,
            start=text.position,
            delimiter=delimiter,
            num_columns=len(columns),
            image=columns.index(chosen.image),
            label=columns.index(chosen.label),
            key=None if chosen.key is None else columns.index(chosen.key),
        )

    def rows(self, text: TextRows) -> Iterator[Row]:
        """Yield the rows; empty lines are none.

        Raises:
            InvalidData: a row is damaged; the message names file and byte.
        """
        reader = csv.reader(text, delimiter=self.delimiter, strict=True)
        while text.begin_row():
            try:
                values = next(reader)
            except csv.Error as error:
                raise text.invalid(error) from error
            if len(values) == self.num_columns:
                yield self._row(values)
            elif len(values) > 1 or "".join(values).strip():
                raise text.invalid(f"{len(values)} fields, where the header has {self.num_columns}")

    def parse(self, row: str) -> Row:
        """Return one row from its text."""
        return self._row(next(csv.reader(io.StringIO(row, newline=""), delimiter=self.delimiter, strict=True)))

    def _row(self, values: list[str]) -> Row:
        return Row(values[self.image], values[self.label], None if self.key is None else values[self.key])


@dataclass(frozen=True)
class JsonLines:
    """Rows that are JSON objects, one a line; the first one names the columns. Members as of :class:`Csv`."""

    image_field: str
    start: int
    label_field: str
    key_field: str | None
    splits: ClassVar[bool] = True

    @classmethod
    def open(cls, path: Path, fields: Fields) -> Self:
        """Read the first row."""
        with _opened(path) as (file, start, size):
            text = TextRows(file, path, start, size)
            columns = list(next(_objects(text), {}))
        chosen = fields.resolve(columns, f"{path}: in its first row")
        return cls(chosen.image, start, chosen.label, chosen.key)

    def rows(self, text: TextRows) -> Iterator[Row]:
        """Yield the rows; raises as :meth:`Csv.rows`."""
        return map(self._row, _objects(text))

    def parse(self, row: str) -> Row:
        """Return one row from its text."""
        return self._row(parse_json(row))

    def _row(self, values: dict[str, Any]) -> Row:
        key = None if self.key_field is None else values.get(self.key_field)
        return Row(values.get(self.image_field), values.get(self.label_field), key)


def _objects(text: TextRows) -> Iterator[dict[str, Any]]:
    while text.begin_row():
        line = next(text)
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            raise text.invalid(f"not JSON: {error}") from error
        if not isinstance(values, dict):
            raise text.invalid("expected a JSON object, one a line")
        yield values


Format = Csv | JsonLines


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int, int]]:
    """Open a table; yield the file, the byte at which its text begins, and its size."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(len(_BOM))
            if start.startswith(_OTHER_ENCODINGS):
                raise InvalidData(f"{path} is UTF-16; save it as UTF-8")
            if not size:
                raise InvalidData(f"{path} is empty")
            yield file, len(_BOM) if start == _BOM else 0, size
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error.strerror}") from error
