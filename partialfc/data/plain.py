"""Sets of WebDataset shards without an ``index.json``: a folder of tars, a tar, a pattern, or a list of these."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from partialfc.data.index import CLASSES, INDEX
from partialfc.data.urls import expand, is_pattern
from partialfc.data.writer import UNFINISHED
from partialfc.errors import InvalidData

DataPath = Path | str | Sequence[Path | str]  # of one set: what data.train takes


def set_folder(source: DataPath) -> Path | None:
    """Return the folder of a set that has an ``index.json`` or should have one; None: it consists of plain tars.

    A path that does not exist is taken for a folder's, unless it looks like something else.
    """
    if not isinstance(source, (str, Path)):
        return None
    path = Path(source)
    if os.path.isdir(path):
        is_of_ours = any(os.path.lexists(path / name) for name in (INDEX, CLASSES, UNFINISHED))  # if incomplete
        return path if is_of_ours or not _tars_in(path) else None
    return None if path.suffix == ".tar" or is_pattern(str(source)) else path


def exists(source: DataPath) -> bool:
    """Return True if a set is there, as far as its first file says."""
    if isinstance(source, (str, Path)) and not is_pattern(str(source)):
        return os.path.exists(source)
    return os.path.exists(list_shards(source)[0])


def list_shards(source: DataPath) -> list[Path]:
    """Return the shards of a plain set, in the order in which they are given; those of a folder by name.

    Raises:
        ConfigError: a pattern is malformed.
        InvalidData: there are none, one is listed twice, or a set with an index of its own is among them.
    """
    parts = [source] if isinstance(source, (str, Path)) else list(source)
    found = [shard for part in parts for shard in _shards_of(part)]
    if not found:
        raise InvalidData(f"{describe(source)}: no shards; expected a data set folder, or .tar files")
    twice, times = Counter(found).most_common(1)[0]
    if times > 1:
        raise InvalidData(f"{describe(source)}: shard {twice} is listed twice")
    return found


def describe(source: DataPath) -> str:
    """Return a set's name for messages."""
    if isinstance(source, (str, Path)):
        return str(source)
    if len(source) < 2:
        return str(source[0]) if source else "[]"
    return f"{source[0]} and {len(source) - 1} more"


def _shards_of(part: Path | str) -> list[Path]:
    paths = [Path(part)] if os.path.exists(part) else [Path(name) for name in expand(str(part))]
    found: list[Path] = []
    for path in paths:
        if not os.path.isdir(path):
            found.append(path)
        elif os.path.lexists(path / INDEX):
            raise InvalidData(f"{path} is a data set folder of its own; a list gives the shards of one set")
        else:
            found += _tars_in(path)
    return found


def _tars_in(folder: Path) -> list[Path]:
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(".tar") and name[0] != ".")
    except OSError as error:
        raise InvalidData(f"{folder} cannot be read: {error.strerror}") from error
