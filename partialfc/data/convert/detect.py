"""Which source a path is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from partialfc.data.convert.fields import Fields
from partialfc.data.convert.folders import FolderPerIdentity
from partialfc.data.convert.manifest import Manifest
from partialfc.data.convert.parquet import Parquet
from partialfc.data.convert.recordio import RecordIO
from partialfc.data.convert.source import Source
from partialfc.data.convert.webdataset_tars import WebDatasetTars
from partialfc.data.urls import expand, is_pattern
from partialfc.errors import ConfigError, InvalidData
from partialfc.options import describe_unknown


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How to read a source; each format takes some of these.

    Attributes:
        images: folder of the images that a table names by their paths.
        image_field, label_field, key_field: names of columns, or in tars of extensions or fields of the JSON.
        split: of a Hugging Face data set, such as ``test``.
    """

    images: Path | None = None
    image_field: str | None = None
    label_field: str | None = None
    key_field: str | None = None
    split: str | None = None

    @property
    def fields(self) -> Fields:
        """The names of the columns."""
        return Fields(self.image_field, self.label_field, self.key_field)


class _Format(NamedTuple):
    matches: Callable[[Path], bool]
    open: Callable[[str, SourceOptions], Source]
    takes: frozenset[str] = frozenset()


_FIELDS = frozenset({"image_field", "label_field", "key_field"})

# In the order of asking: any folder may be one of identities.
FORMATS = {
    "recordio": _Format(RecordIO.matches, lambda text, _: RecordIO.open(Path(text))),
    "manifest": _Format(
        Manifest.matches,
        lambda text, options: Manifest(Path(text), options.images, options.fields),
        _FIELDS | {"images"},
    ),
    "parquet": _Format(
        Parquet.matches,
        lambda text, options: Parquet(Path(text), options.images, options.fields, options.split),
        _FIELDS | {"images", "split"},
    ),
    "webdataset": _Format(
        WebDatasetTars.matches,
        lambda text, options: WebDatasetTars(text, options.fields),
        frozenset({"image_field", "label_field"}),
    ),
    "folders": _Format(FolderPerIdentity.matches, lambda text, _: FolderPerIdentity.open(Path(text))),
}


def open_source(text: str, format: str | None = None, options: SourceOptions | None = None) -> Source:
    """Return the source at a path, or at a pattern of tars: of the named format, or of the first that recognises it.

    Raises:
        ConfigError: the format is unknown, or does not take an option.
        InvalidData: nothing is there, or no format recognises it.
    """
    options = options or SourceOptions()
    if format is not None and format not in FORMATS:
        raise ConfigError(f"--format: {describe_unknown(format, FORMATS)}")
    path = Path(text)
    if not path.exists() and not is_pattern(text):
        raise InvalidData(f"{path} does not exist")
    name = format or next((name for name, each in FORMATS.items() if each.matches(path)), None)
    if name is None:
        raise InvalidData(f"{path} is in none of the formats {', '.join(FORMATS)}")
    for field in fields(options):
        if getattr(options, field.name) is not None and field.name not in FORMATS[name].takes:
            raise ConfigError(f"--{field.name.replace('_', '-')} has no meaning for {text}, which is read as {name}")
    return FORMATS[name].open(text, options)


def origin_of(text: str) -> Path:
    """Return the file or folder that a source lies in; of a pattern, the folder of its first tar."""
    path = Path(text)
    return path if path.exists() or not is_pattern(text) else Path(expand(text)[0]).parent
