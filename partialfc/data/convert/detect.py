"""Which source a path is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from partialfc.data.convert.folders import FolderPerIdentity
from partialfc.data.convert.recordio import RecordIO
from partialfc.data.convert.source import Source
from partialfc.errors import ConfigError, InvalidData
from partialfc.options import describe_unknown


class _Format(NamedTuple):
    matches: Callable[[Path], bool]
    open: Callable[[Path], Source]


# In the order of asking: any folder may be one of identities.
FORMATS = {
    "recordio": _Format(RecordIO.matches, RecordIO.open),
    "folders": _Format(FolderPerIdentity.matches, FolderPerIdentity.open),
}


def open_source(path: Path, format: str | None = None) -> Source:
    """Return the source at a path: of the named format, or of the first one that recognises it.

    Raises:
        ConfigError: the format is unknown.
        InvalidData: nothing is there, or no format recognises it.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"--format: {describe_unknown(format, FORMATS)}")
    if not path.exists():
        raise InvalidData(f"{path} does not exist")
    for each in [FORMATS[format]] if format else FORMATS.values():
        if format or each.matches(path):
            return each.open(path)
    raise InvalidData(f"{path} is in none of the formats {', '.join(FORMATS)}")
