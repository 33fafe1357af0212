"""WebDataset tars as a source: a folder of them, one, a pattern such as ``train-{000..123}.tar``, or a list."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from partialfc.data.convert.fields import Fields, identity_text
from partialfc.data.convert.image_root import too_large
from partialfc.data.convert.source import MAX_SIZE, Record, Skipped, Source, Unreadable, sample_key
from partialfc.data.convert.source_files import file_state, open_file
from partialfc.data.convert.webdataset_samples import Wanted, labelled_images
from partialfc.data.open_files import OpenFiles
from partialfc.data.plain import list_shards
from partialfc.data.samples import MAX_LABEL_BYTES, split_name
from partialfc.data.tar import Member, TarReader
from partialfc.data.urls import is_pattern
from partialfc.errors import DataUnavailable, InvalidData
from partialfc.files import parse_json

_MAX_JSON_BYTES = 1 << 20
_LOOKED_AT = 1000  # members of the first tar, at least, that show where labels are
_NO_IDENTITY = Skipped("sample without an identity")


@dataclass(frozen=True)
class WebDatasetTars(Source):
    """Tars of samples.

    Attributes:
        source: folder, file, pattern, or several of these.
        fields: ``image`` is the extension of the images, for samples of several; ``label`` an extension such as
            ``txt``, or a field of the ``.json``; None takes the ``.cls``, or else the ``.txt``. ``key`` has no use:
            samples have keys.
    """

    source: Path | str | Sequence[Path | str]
    fields: Fields = field(default_factory=Fields)
    kind = "webdataset"
    in_blocks = False

    @staticmethod
    def matches(path: Path | str) -> bool:
        """Return True if a path is called like a tar or a pattern of tars, or is a folder with a tar in it."""
        if Path(path).is_dir():
            with os.scandir(path) as entries:
                return any(entry.name.endswith(".tar") for entry in islice(entries, _LOOKED_AT))
        return str(path).lower().endswith(".tar") or is_pattern(str(path))

    def fingerprint(self) -> Any:
        """Return names, sizes and times of the tars, and what is taken from them."""
        missing = next((path for path in self._files if not os.path.lexists(path)), None)
        if missing is not None:
            raise InvalidData(f"{missing} does not exist")
        paths = [Path(os.path.abspath(path)) for path in self._files]
        base = Path(os.path.commonpath([path.parent for path in paths]))
        return [[file_state(path, base) for path in paths], *self._wanted, self._json_field]

    def parts(self) -> Sequence[int]:
        """Return the numbers of the tars."""
        return range(len(self._files))

    def list_part(self, part: int) -> Iterator[Record | Skipped]:
        """Yield the samples of a tar."""
        with self._tar(part) as tar:
            for found in labelled_images(tar, self._wanted):
                if isinstance(found, Skipped):
                    yield found
                    continue
                identity = self._identity(tar, found.label)
                if identity is None:
                    yield _NO_IDENTITY
                else:
                    # Archives of the current folder have names such as ./a.jpg.
                    key = "/".join(name for name in found.key.split("/") if name != ".")
                    size = min(found.image.size, MAX_SIZE)
                    yield Record(sample_key(key), identity, file=part, offset=found.image.offset, size=size)

    def read(self, records: Sequence[Record]) -> Iterator[bytes | Unreadable]:
        """Yield the images."""
        files = OpenFiles(self._files)
        try:
            for record in records:
                yield too_large(record.size) or self._image(files, record)
        finally:
            files.close()

    def _image(self, files: OpenFiles, record: Record) -> bytes:
        path = self._files[record.file]
        try:
            data = os.pread(files.descriptor(record.file), record.size, record.offset)
        except OSError as error:
            raise DataUnavailable(f"{path} cannot be read: {error.strerror}") from error
        if len(data) < record.size:
            raise InvalidData(f"{path}: ends before sample {record.key!r}; was it changed meanwhile?")
        return data

    def _identity(self, tar: TarReader, member: Member) -> str | None:
        json_field = self._json_field
        most = MAX_LABEL_BYTES if json_field is None else _MAX_JSON_BYTES
        where = f"{tar.path}: {member.name!r} at byte {member.offset}"
        if member.size > most:
            raise InvalidData(f"{where} has {member.size:,} bytes, a label up to {most:,}")
        content = tar.read(member.offset, member.size)
        try:
            if json_field is None:
                return content.decode().strip() or None
            values = parse_json(content)
            if not isinstance(values, dict):
                raise ValueError("expected a JSON object")
            return identity_text(values.get(json_field))
        except ValueError as error:
            raise InvalidData(f"{where}: {error}") from error

    @cached_property
    def _files(self) -> list[Path]:
        return list_shards(self.source)

    @cached_property
    def _wanted(self) -> Wanted:
        """What the first members of the first tar, and the options, tell of images and labels."""
        found = set[str]()
        with self._tar(0) as tar:
            for number, member in enumerate(tar.members(), start=1):
                found.update(_extension(member))
                if number >= _LOOKED_AT and self._label_among(found):  # labels may lie behind all images
                    break
        label = self._label_among(found)
        if label is None:
            have = ", ".join("." + extension for extension in sorted(found)[:20]) or "none"
            expected = f".{self.fields.label} or .json" if self.fields.label else ".cls or .txt"
            raise InvalidData(f"{self._files[0]}: no labels: expected {expected}, found {have}; see --label-field")
        return Wanted(label, self.fields.image.lower() if self.fields.image else None)

    def _label_among(self, extensions: set[str]) -> str | None:
        """Return the last part of the extension of the labels; None if there are none."""
        types = {extension.rpartition(".")[2] for extension in extensions}
        label = self.fields.label
        if label is None:
            return next((type for type in ("cls", "txt") if type in types), None)
        return label.lower() if label.lower() in extensions | types else "json" if "json" in types else None

    @property
    def _json_field(self) -> str | None:
        return self.fields.label if self._wanted.label == "json" else None

    @contextmanager
    def _tar(self, number: int) -> Iterator[TarReader]:
        path = self._files[number]
        with open_file(path) as file:
            try:
                yield TarReader(file, path)
            except OSError as error:
                raise DataUnavailable(f"{path} cannot be read: {error.strerror}") from error


def _extension(member: Member) -> list[str]:
    parts = split_name(member.name)
    return [] if parts is None else [parts[1]]
