"""Parquet as a source: a file, a folder of them, or a dataset folder of Hugging Face.

Row groups are read in sequence only, so a row group is a block: its images go into a temporary file, from which they
are taken in any order.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from partialfc.data.convert.fields import Fields, identity_text
from partialfc.data.convert.found_files import file_states, files_below, has_file_below
from partialfc.data.convert.image_root import MAX_IMAGE_BYTES, ImageRoot
from partialfc.data.convert.parquet_file import ParquetTable, open_table
from partialfc.data.convert.source import Record, Skipped, Source, Unreadable, sample_key
from partialfc.errors import DataUnavailable, InvalidData

_SUFFIX = ".parquet"
_IN_MEMORY = 64 << 20  # bytes of a row group; more goes to the disk
_UNLABELLED = -1  # in Hugging Face's test sets
_NO_IDENTITY = Skipped("row without an identity")
_NO_IMAGE = Skipped("row without an image")
_NULL = Unreadable("is null")

# Hugging Face names files train-00000-of-00005.parquet, or puts them into train/.
_PIECE_OF_SPLIT = re.compile(r"(?:^|/)([\w.]+)-\d+-of-\d+[^/]*$")
_SPLIT_WORD = re.compile(
    r"(?:^|[-_./ ])(?:(train|training)|(validation|valid|val|dev)|(test|testing|eval|evaluation))(?=[-_./ 0-9])"
)
_SPLITS = ("train", "validation", "test")


class _Place(NamedTuple):
    """Where a row's image, or its path, lies in the temporary file."""

    start: int
    size: int
    is_path: bool


@dataclass(frozen=True)
class Parquet(Source):
    """Tables of images.

    Attributes:
        path: of a file, or of a folder with files at any depth.
        images: folder of the image files, if the tables have paths; None: the folder of the tables.
        fields: columns to take. The image may be binary, a struct with ``bytes`` and ``path``, or a text, its path.
        split: files to take, such as ``test``; None takes ``train``, or the only one.
    """

    path: Path
    images: Path | None = None
    fields: Fields = field(default_factory=Fields)
    split: str | None = None
    kind = "parquet"
    in_blocks = True

    @staticmethod
    def matches(path: Path) -> bool:
        """Return whether a path is called like a Parquet file, or is a folder with one near its top."""
        return has_file_below(path, _SUFFIX) if path.is_dir() else path.suffix.lower() == _SUFFIX

    def fingerprint(self) -> Any:
        """Return a digest of the names, sizes and times of the files, and what is taken from them."""
        first = next(file for file, split in enumerate(self._splits) if split == self._split)
        with self._table(first) as table:
            taken = [table.image.name, table.label, table.key, self._split, str(self.images)]
        states = json.dumps(list(file_states(self._files, self._folder))).encode()
        return [len(self._files), hashlib.sha256(states).hexdigest(), taken]

    def parts(self) -> Sequence[int]:
        """Return the numbers of the files."""
        return range(len(self._files))

    def list_part(self, part: int) -> Iterator[Record | Skipped]:
        """Yield the rows of a file."""
        if self._splits[part] != self._split:
            yield Skipped(f"file of the split {self._splits[part] or 'without a name'}; --split takes another one")
            return
        stem, row = self._relative(part).removesuffix(_SUFFIX), 0
        with self._table(part) as table:
            paths = None if table.image.content else table.image.name
            names = list(dict.fromkeys(name for name in (table.label, table.key, paths) if name is not None))
            for group in range(table.num_row_groups):
                first = row
                for columns in table.columns(group, names):
                    for values in zip(*columns, strict=True):
                        row_of = dict(zip(names, values, strict=True))
                        try:
                            key = self._key(table, row_of, f"{stem}/{row:09d}")
                            identity = _identity(row_of[table.label], table.class_names)
                        except ValueError as error:
                            raise InvalidData(f"{table.path}: row {row}: {error}") from error
                        if identity is None or key is None:
                            yield _NO_IDENTITY if identity is None else _NO_IMAGE
                        else:
                            yield Record(sample_key(key), identity, file=part, offset=group, size=row - first)
                        row += 1

    def _key(self, table: ParquetTable, row: dict[str, Any], place: str) -> str | None:
        """Return what the key of a row is made of: a column, the path, or the place; None if there is no image."""
        path = place if table.image.content else row[table.image.name]
        if not path:
            return None
        if not table.image.content:
            path = os.path.splitext(self._root.relative(path))[0]
        if table.key is None:
            return path
        key = identity_text(row[table.key])
        if key is None:
            raise ValueError("the key is empty")
        return key

    def read(self, records: Sequence[Record]) -> Iterator[bytes | Unreadable]:
        """Yield the images; each run of records of one row group reads it once."""
        for (file, group), block in groupby(records, key=lambda record: (record.file, record.offset)):
            rows = [record.size for record in block]
            with self._table(file) as table, _temporary_file() as spool:
                places = _spool(table, group, set(rows), spool)
                for row in rows:
                    place = places.get(row)
                    if place is None:
                        raise InvalidData(f"{self._files[file]}: row group {group} has no row {row}; was it changed?")
                    yield self._image(place, spool)

    def _image(self, place: _Place | Unreadable, spool: Any) -> bytes | Unreadable:
        if isinstance(place, Unreadable):
            return place
        spool.seek(place.start)
        content: bytes = spool.read(place.size)
        if not place.is_path:
            return content
        try:
            return self._root.read(self._root.relative(content.decode()))
        except ValueError as error:
            return Unreadable(f"its path {error}")

    @cached_property
    def _files(self) -> list[Path]:
        return files_below(self.path, _SUFFIX) if self.path.is_dir() else [self.path]

    @cached_property
    def _splits(self) -> list[str]:
        if not self.path.is_dir():
            return [self.split or ""]
        return [_split_of(self._relative(file)) for file in range(len(self._files))]

    @cached_property
    def _split(self) -> str:
        found = sorted(set(self._splits))
        wanted = self.split or (found[0] if len(found) == 1 else "train")
        if wanted not in found:
            names = ", ".join(name or "files without a split in their names" for name in found)
            raise InvalidData(f"{self.path}: expected files of the split {wanted}, found {names}; choose with --split")
        return wanted

    @property
    def _folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def _root(self) -> ImageRoot:
        return ImageRoot(self.images or self._folder)

    def _relative(self, file: int) -> str:
        return os.path.relpath(self._files[file], self._folder)

    def _table(self, file: int) -> Any:
        return open_table(self._files[file], self.fields)


def _split_of(path: str) -> str:
    """Return the split that a file's name or folder tells, such as ``train``; else an empty text."""
    piece = _PIECE_OF_SPLIT.search(path)
    if piece:
        return piece[1]
    word = _SPLIT_WORD.search(path.lower())
    return next(name for name, found in zip(_SPLITS, word.groups(), strict=True) if found) if word else ""


def _identity(value: Any, class_names: list[str] | None) -> str | None:
    if class_names is None or type(value) is not int:
        return identity_text(value)
    if value == _UNLABELLED:
        return None
    if not 0 <= value < len(class_names):
        raise ValueError(f"label {value} is none of the {len(class_names):,} classes that the file names")
    return class_names[value]


def _spool(table: ParquetTable, group: int, rows: set[int], spool: Any) -> dict[int, _Place | Unreadable]:
    """Write the images of some rows into the temporary file."""
    places: dict[int, _Place | Unreadable] = {}
    end = 0
    for row, (content, path) in enumerate(table.images(group)):
        if row not in rows:
            continue
        data = content if content is not None else path.encode() if path else None
        if data is None:
            places[row] = _NULL
        elif len(data) > MAX_IMAGE_BYTES:
            places[row] = Unreadable(f"has {len(data):,} bytes, more than an image can have")
        else:
            spool.write(data)
            places[row] = _Place(end, len(data), content is None)
            end += len(data)
    return places


@contextmanager
def _temporary_file() -> Iterator[Any]:
    try:
        with tempfile.SpooledTemporaryFile(_IN_MEMORY) as spool:
            yield spool
    except OSError as error:
        raise DataUnavailable(f"no temporary file in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR") from error
