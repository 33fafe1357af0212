"""Files of a source: those of one kind below a folder, how they are opened, and by what a change of one is noticed."""

from __future__ import annotations

import os
from io import BufferedReader
from pathlib import Path

from partialfc.errors import DataUnavailable, InvalidData
from partialfc.files import open_regular

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
    """Return True if there is such a file among the first thousand entries, nearest ones first."""
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


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        DataUnavailable: it cannot be opened or is not a regular file.
    """
    try:
        return open_regular(path)
    except OSError as error:
        raise DataUnavailable(f"{path} cannot be read: {error.strerror}") from error


def file_state(path: Path, base: Path) -> tuple[str, int, int]:
    """Return a file's path relative to ``base``, its size in bytes and its time of modification in nanoseconds.

    Raises:
        DataUnavailable: it cannot be looked at.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataUnavailable(f"{path} cannot be read: {error.strerror}") from error
    return os.path.relpath(path, base), status.st_size, status.st_mtime_ns


def _has_suffix(name: str, suffix: str) -> bool:
    return name.lower().endswith(suffix) and not name.startswith(".")
