"""One Parquet file of images: its columns, and batches of rows that bound the memory. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from partialfc.data.convert.fields import PATH_FIELDS, Fields
from partialfc.data.convert.source_files import open_file
from partialfc.errors import DataUnavailable, InvalidData, MissingDependency
from partialfc.files import parse_json

_BUFFER_BYTES = 1 << 20  # read of a column at a time, not the column of a whole row group
_BATCH_BYTES = 32 << 20
_MAX_BATCH_ROWS = 4096
_BINARY, _TEXT = {"binary", "large_binary", "binary_view"}, {"string", "large_string", "string_view"}


@dataclass(frozen=True)
class ImageColumn:
    """Where a table keeps its images.

    Attributes:
        name: of the column.
        content: the part of it with encoded images; empty if there are paths only.
        path: the part of it with paths; empty if there are none.
    """

    name: str
    content: str
    path: str

    @property
    def parts(self) -> list[str]:
        """The parts that there are."""
        return [part for part in (self.content, self.path) if part]


class ParquetTable:
    """An open Parquet file."""

    def __init__(self, path: Path, file: Any, fields: Fields) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise MissingDependency("reading Parquet needs pyarrow: pip install 'partialfc[convert]'") from error

        self.path = path
        with self.explained():
            self._file = pyarrow.parquet.ParquetFile(
                file, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            )
            self.schema = self._file.schema_arrow
        self.num_row_groups: int = self._file.num_row_groups
        self.image = self._image_column(fields.image)
        chosen = Fields(self.image.name, fields.label, fields.key).resolve(self.schema.names, str(path))
        self.label, self.key = chosen.label, chosen.key

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what pyarrow raises into errors of data, in the context."""
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            if getattr(error, "errno", None) is not None:
                raise DataUnavailable(f"{self.path} cannot be read: {error}") from error
            reason = " ".join(str(error).split())[:300]
            raise InvalidData(f"{self.path}: damaged, encrypted, or not Parquet: {reason}") from error

    @cached_property
    def class_names(self) -> list[str] | None:
        """Names of the classes, where the labels are their numbers: a ``ClassLabel`` of Hugging Face's datasets."""
        try:
            info = parse_json((self.schema.metadata or {})[b"huggingface"])
            feature = info["info"]["features"][self.label]
            names = feature["names"] if feature.get("_type", "ClassLabel") == "ClassLabel" else None
        except (KeyError, TypeError, AttributeError, ValueError):
            return None
        if names is not None and not _are_names(names):
            raise InvalidData(
                f"{self.path}: the classes that the file names for column {self.label!r} must be different texts, got "
                f"{shortened(names)}"
            )
        return names

    def rows(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield row group, row in it, and values of every row: label, key and, if it is no image itself, path."""
        paths = None if self.image.content else self.image.name
        names = list(dict.fromkeys(name for name in (self.label, self.key, paths) if name is not None))
        for group in range(self.num_row_groups):
            row = 0
            for batch in self._batches(group, names, _MAX_BATCH_ROWS):
                with self.explained():
                    columns = [batch.column(name).to_pylist() for name in names]
                for values in zip(*columns, strict=True):
                    yield group, row, dict(zip(names, values, strict=True))
                    row += 1

    def images(self, group: int) -> Iterator[tuple[Any, Any]]:
        """Yield content and path of the image of each row of a row group, None for a part that is none."""
        column = self.image
        for batch in self._batches(group, self._image_parts(), self._batch_rows(group)):
            with self.explained():
                array = batch.column(column.name)
                if column.name in column.parts:
                    parts = {column.name: array}
                else:
                    names = [array.type.field(i).name for i in range(array.type.num_fields)]
                    parts = dict(zip(names, array.flatten(), strict=True))
            content, path = parts.get(column.content), parts.get(column.path)
            for row in range(len(array)):
                with self.explained():
                    values = [None if part is None else part[row].as_py() for part in (content, path)]
                yield values[0], values[1]

    def _batches(self, group: int, columns: list[str], rows: int) -> Iterator[Any]:
        with self.explained():
            yield from self._file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)

    def _batch_rows(self, group: int) -> int:
        with self.explained():
            rows = self._file.metadata.row_group(group)
            return max(1, min(_MAX_BATCH_ROWS, rows.num_rows * _BATCH_BYTES // max(1, rows.total_byte_size)))

    def _image_parts(self) -> list[str]:
        image = self.image
        return [part if part == image.name else f"{image.name}.{part}" for part in image.parts]

    def _image_column(self, wanted: str | None) -> ImageColumn:
        """Return the column of images: the wanted one, or the only one with content, or else with paths."""
        found = {field.name: self._as_image(field) for field in self.schema}
        if wanted is None:
            content = [name for name, column in found.items() if column and column.content]
            # A text may be anything, unless it is called like a path.
            paths = [name for name in found if name.strip().lower() in PATH_FIELDS and found[name]]
            names = content or paths
        else:
            names = [name for name in found if name == wanted]
        if len(names) != 1:
            have = ", ".join(f"{field.name!r} ({field.type})" for field in self.schema)[:500]
            problem = "several columns could be the images" if len(names) > 1 else "no column of images"
            raise InvalidData(f"{self.path}: {problem}, there are {have}; name the right one with --image-field")
        column = found[names[0]]
        if column is None:
            raise InvalidData(
                f"{self.path}: column {names[0]!r} must hold images (binary, or a struct with 'bytes') or paths "
                f"(string), it is of type {self.schema.field(names[0]).type}"
            )
        return column

    def _as_image(self, field: Any) -> ImageColumn | None:
        kind = _kind(field.type)
        if kind == "struct":
            parts = {field.type.field(i).name: _kind(field.type.field(i).type) for i in range(field.type.num_fields)}
            if parts.get("bytes") == "binary":
                return ImageColumn(field.name, "bytes", "path" if parts.get("path") == "text" else "")
        if kind == "binary":
            return ImageColumn(field.name, field.name, "")
        return ImageColumn(field.name, "", field.name) if kind == "text" else None


@contextmanager
def open_table(path: Path, fields: Fields) -> Iterator[ParquetTable]:
    """Open a Parquet file as a context.

    Raises:
        InvalidData: it is damaged, encrypted or not Parquet, or has other columns.
        DataUnavailable: it cannot be read.
        MissingDependency: pyarrow is not installed.
    """
    with open_file(path) as file:
        yield ParquetTable(path, file, fields)


def _kind(type: Any) -> str:
    name = str(type.value_type if str(type).startswith("dictionary<") else type)
    return "binary" if name in _BINARY else "text" if name in _TEXT else name.partition("<")[0]


def _are_names(value: Any) -> bool:
    is_list = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    return is_list and len(set(value)) == len(value)
