"""Which source a path is, and what the options of the command mean for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """What is known of a source besides its path; None where nothing is said.

    Attributes:
        images: folder of the image files that a table names.
        image_field: column, field or extension of the image.
        label_field: column, field or extension of the identity.
        key_field: column of the key.
        split: of a Parquet data set.
    """

    images: Path | None = None
    image_field: str | None = None
    label_field: str | None = None
    key_field: str | None = None
    split: str | None = None

    @property
    def fields(self) -> Fields:
        """The names of the fields."""
        return Fields(self.image_field, self.label_field, self.key_field)


class _Format(NamedTuple):
    matches: Callable[[Path], bool]
    open: Callable[[Path, SourceOptions], Source]
    options: tuple[str, ...] = ()  # that mean something


PAIRS = "pairs"  # the format of verification sets, which are no source of records

# In the order of asking: any folder may be one of identities.
FORMATS = {
    "recordio": _Format(RecordIO.matches, lambda path, _: RecordIO.open(path)),
    "manifest": _Format(
        Manifest.matches,
        lambda path, options: Manifest(path, options.images, options.fields),
        ("images", "image_field", "label_field", "key_field"),
    ),
    "parquet": _Format(
        Parquet.matches,
        lambda path, options: Parquet(path, options.images, options.fields, options.split),
        ("images", "image_field", "label_field", "key_field", "split"),
    ),
    "webdataset": _Format(
        WebDatasetTars.matches,
        lambda path, options: WebDatasetTars(path, options.fields),
        ("image_field", "label_field"),
    ),
    "folders": _Format(FolderPerIdentity.matches, lambda path, _: FolderPerIdentity.open(path)),
}


def open_source(path: Path, format: str | None = None, options: SourceOptions | None = None) -> Source:
    """Return the source at a path: of the named format, or of the first one that recognises it.

    Raises:
        ConfigError: the format is unknown, or an option means nothing to it.
        InvalidData: no format recognises what is there.
    """
    options = options or SourceOptions()
    if format is not None and format not in FORMATS:
        raise ConfigError(f"--format: {describe_unknown(format, [*FORMATS, PAIRS])}")
    name = format or next((name for name, each in FORMATS.items() if each.matches(path)), None)
    if name is None:
        problem = f"is in none of the formats {', '.join(FORMATS)}" if path.exists() else "does not exist"
        raise InvalidData(f"{path} {problem}")
    for option, value in vars(options).items():
        if value is not None and option not in FORMATS[name].options:
            raise ConfigError(f"--{option.replace('_', '-')} means nothing for {path}, which is taken for {name}")
    return FORMATS[name].open(path, options)


def origin_of(path: Path) -> Path:
    """Return the file or folder that a source lies in; of a pattern, the folder of its first tar."""
    return path if path.exists() or not is_pattern(str(path)) else Path(expand(str(path))[0]).parent
