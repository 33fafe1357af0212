"""Parquet as a source: a file, a folder of them, or a dataset folder of Hugging Face.

Row groups are read in sequence only, so a row group of images is a block. Paths of image files are kept in the records.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from partialfc.data.convert.fields import NO_IDENTITY, NO_IMAGE, Fields, identity_text, require_key
from partialfc.data.convert.image_root import ImageRoot, too_large
from partialfc.data.convert.parquet_file import ParquetTable, open_table
from partialfc.data.convert.source import Record, Skipped, Source, Unreadable, sample_key
from partialfc.data.convert.source_files import file_state, files_below, has_file_below
from partialfc.errors import InvalidData

_SUFFIX = ".parquet"
_UNLABELLED = -1  # in Hugging Face's test sets

# Hugging Face names files train-00000-of-00005.parquet, or puts them into train/.
_PIECE_OF_SPLIT = re.compile(r"(?:^|/)([\w.]+)-\d+-of-\d+[^/]*$")
_SPLIT_WORD = re.compile(
    r"(?:^|[-_./ ])(?:(train|training)|(validation|valid|val|dev)|(test|testing|eval|evaluation))(?=[-_./ 0-9])"
)
_SPLITS = ("train", "validation", "test")


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

    @cached_property
    def in_blocks(self) -> bool:  # type: ignore[override]  # it depends on the columns
        """True if the tables hold images; paths can be read in any order."""
        with self._table(self._first) as table:
            return bool(table.image.content)

    @staticmethod
    def matches(path: Path) -> bool:
        """Return True if a path is called like a Parquet file, or is a folder with one near its top."""
        return has_file_below(path, _SUFFIX) if path.is_dir() else path.suffix.lower() == _SUFFIX

    def fingerprint(self) -> Any:
        """Return a digest of the names, sizes and times of the files, and what is taken from them."""
        self._root.require()
        with self._table(self._first) as table:
            taken = [table.image.name, table.label, table.key, self._split, str(self.images)]
        states = json.dumps([file_state(path, self._folder) for path in self._files]).encode()
        return [len(self._files), hashlib.sha256(states).hexdigest(), taken]

    def parts(self) -> Sequence[int]:
        """Return the numbers of the files."""
        return range(len(self._files))

    def list_part(self, part: int) -> Iterator[Record | Skipped]:
        """Yield the rows of a file."""
        if self._splits[part] != self._split:
            yield Skipped(f"file of the split {self._splits[part] or 'without a name'}; --split takes another one")
            return
        stem = self._relative(part).removesuffix(_SUFFIX)
        with self._table(part) as table:
            for row, (group, in_group, values) in enumerate(table.rows()):
                try:
                    record = self._record(table, values, f"{stem}/{row:09d}", part, group, in_group)
                except ValueError as error:
                    raise InvalidData(f"{table.path}: row {row}: {error}") from error
                yield record

    def _record(
        self, table: ParquetTable, values: dict[str, Any], place: str, file: int, group: int, row: int
    ) -> Record | Skipped:
        path = ""
        if not table.image.content:
            if not values[table.image.name]:
                return NO_IMAGE
            path = self._root.relative(values[table.image.name])
        identity = _identity(values[table.label], table.class_names)
        if identity is None:
            return NO_IDENTITY
        key = os.path.splitext(path)[0] or place
        if table.key is not None:
            key = require_key(values[table.key])
        return Record(sample_key(key), identity, path, file, group, row)

    def read(self, records: Sequence[Record]) -> Iterator[bytes | Unreadable]:
        """Yield the images; rows of a row group that are asked for in sequence are read in one go."""
        for in_files, run in groupby(records, key=lambda record: bool(record.path)):
            if in_files:
                yield from (self._root.read(record.path) for record in run)
            else:
                yield from self._read_rows(run)

    def _read_rows(self, records: Iterable[Record]) -> Iterator[bytes | Unreadable]:
        place = -1, -1, -1
        rows: Iterator[tuple[int, tuple[bytes | None, str | None]]] = iter(())
        with ExitStack() as stack:
            for record in records:
                following = record.file, record.offset, record.size
                if following[:2] != place[:2] or following <= place:
                    stack.close()
                    table = stack.enter_context(self._table(record.file))
                    rows = enumerate(table.images(record.offset))
                place = following
                image = next((image for row, image in rows if row == record.size), None)
                if image is None:
                    where = f"{self._files[record.file]}: row group {record.offset}"
                    raise InvalidData(f"{where} has no row {record.size}; was it changed meanwhile?")
                yield self._image(*image)

    def _image(self, content: bytes | None, path: str | None) -> bytes | Unreadable:
        if content is not None:
            return too_large(len(content)) or content
        if not path:
            return Unreadable("is null")
        try:
            return self._root.read(self._root.relative(path))
        except ValueError as error:
            return Unreadable(f"its path {error}")

    @property
    def _first(self) -> int:
        return next(file for file, split in enumerate(self._splits) if split == self._split)

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
