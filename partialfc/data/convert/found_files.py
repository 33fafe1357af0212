"""Files of one kind below a folder, in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from partialfc.errors import DataUnavailable, InvalidData

_MAX_LOOKED_AT = 1000


def files_below(folder: Path, suffix: str) -> list[Path]:
    """Return the files of a suffix in a folder at any depth, in the order of their names; links to files count.

    Hidden files and folders are left out, and links to folders.

    Raises:
        InvalidData: there are none.
        DataUnavailable: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataUnavailable(f"{error.filename} cannot be read: {error.strerror}") from error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in names if _has_suffix(name, suffix)]
    if not found:
        raise InvalidData(f"{folder} holds no {suffix} files")
    return sorted(found, key=os.fsencode)


def has_file_below(folder: Path, suffix: str) -> bool:
    """Return whether there is such a file among the first thousand entries, nearest ones first."""
    folders, looked_at = [os.fspath(folder)], 0
    for place in folders:
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    looked_at += 1
                    if looked_at > _MAX_LOOKED_AT:
                        return False
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif _has_suffix(entry.name, suffix):
                        return True
        except OSError:
            continue
    return False


def file_states(paths: list[Path], base: Path) -> Iterator[Any]:
    """Yield name, size and time of each file.

    Raises:
        DataUnavailable: one cannot be looked at.
    """
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataUnavailable(f"{path} cannot be read: {error.strerror}") from error
        yield [os.path.relpath(path, base), status.st_size, status.st_mtime_ns]


def _has_suffix(name: str, suffix: str) -> bool:
    return name.lower().endswith(suffix) and not name.startswith(".")
