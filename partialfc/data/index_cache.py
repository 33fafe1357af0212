"""Where the index of a set is kept, and who makes it: one process of a host, while the others wait."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from partialfc.data.class_table import class_line
from partialfc.data.index import CLASSES
from partialfc.data.indexing import Classes, write_index
from partialfc.data.offsets import OFFSETS, IndexedSet, SampleIndex, load_index
from partialfc.errors import DataUnavailable
from partialfc.files import FileLock, open_new
from partialfc.tracking.console import Progress, log

_LOCK = f".{OFFSETS}.lock"
_SILENT_SECONDS = 600.0  # after which the process that makes an index counts as stuck
_WAIT_SECONDS = 5.0
_QUIET_SECONDS = 30.0  # of waiting, before a line says so


def beside(shards: Sequence[Path]) -> Path:
    """Return the folder beside the first shard for the index of a set without a folder of its own."""
    folder = shards[0].parent
    names = "\n".join(shard.name if shard.parent == folder else os.path.relpath(shard, folder) for shard in shards)
    return folder / f"partialfc-index-{_short_digest(names)}"


def open_index(indexed: IndexedSet, folder: Path, needs_table: bool, progress: Progress) -> SampleIndex:
    """Return the index of a set: from ``folder`` or the user's cache folder, or made and kept there.

    Where neither can be written, a temporary folder of this process serves.

    Args:
        folder: beside the data; created if it is missing.
        needs_table: a class table is kept beside the index.

    Raises:
        InvalidData: a shard is damaged or hostile.
        DataUnavailable: a shard cannot be read, no folder can be written, or another process does not finish the index.
    """
    index = _load(folder, indexed, needs_table)
    if index is not None:
        return index
    elsewhere = _user_cache(indexed)
    for place in elsewhere:
        index = _load(place, indexed, needs_table)
        if index is not None:
            return index
    for place in (folder, *elsewhere):
        with suppress(OSError):
            return _make(place, indexed, needs_table, progress)
    try:
        return _make(_temporary_folder(), indexed, needs_table, progress)
    except OSError as error:
        raise DataUnavailable(f"the index of {indexed.name} cannot be written anywhere: {error.strerror}") from error


def _user_cache(indexed: IndexedSet) -> list[Path]:
    """Return the folder for this set in the user's cache; it may be shared by hosts, and the set not."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home):
        return []
    names = [socket.gethostname(), *(os.path.abspath(shard.path) for shard in indexed.shards)]
    return [Path(home) / "partialfc" / f"index-{_short_digest(json.dumps(names))}"]


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _temporary_folder() -> Path:
    folder, owner = Path(tempfile.mkdtemp(prefix="partialfc-index-")), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # and not a process forked from it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _load(folder: Path, indexed: IndexedSet, needs_table: bool) -> SampleIndex | None:
    if needs_table and not os.path.isfile(folder / CLASSES):
        return None
    return load_index(folder / OFFSETS, indexed)


def _make(folder: Path, indexed: IndexedSet, needs_table: bool, progress: Progress) -> SampleIndex:
    """Make the index in ``folder``, unless another process does so meanwhile; raises OSError if that is impossible."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink() and needs_table:  # a folder of ours would be none
        raise OSError("a symbolic link")
    lock = FileLock(folder / _LOCK)
    try:
        _wait_for(lock, indexed)
        index = _load(folder, indexed, needs_table)  # another process may just have made it
        if index is None:
            if not lock.unsupported:  # else they may be another process's, which is at work
                _remove_leftovers(folder)
            _write(folder, indexed, needs_table, progress, alive=lambda: _touch(lock.path))
            index = _load(folder, indexed, needs_table)
        if index is None:
            raise DataUnavailable(f"{indexed.name} changed while it was indexed, or {folder} cannot be read; try again")
        return index
    finally:
        with suppress(OSError):
            lock.path.unlink()
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f".{OFFSETS}.*"):
        if path.name != _LOCK:
            path.unlink()


def _touch(path: Path) -> None:
    with suppress(OSError):  # where locks are not supported, another process may have removed it
        os.utime(path)


def _wait_for(lock: FileLock, indexed: IndexedSet) -> None:
    began = since = time.monotonic()
    seen, said = 0, False
    while not lock.acquire(_WAIT_SECONDS):
        now = time.monotonic()
        with suppress(FileNotFoundError):  # it has just finished
            modified = lock.path.stat().st_mtime_ns
            if modified != seen:
                seen, since = modified, now
        if now - since > _SILENT_SECONDS:
            raise DataUnavailable(
                f"another process has not gone on indexing {indexed.name} for {_SILENT_SECONDS:.0f} s; "
                f"end the one that holds {lock.path}, and start again"
            )
        if not said and now - began > _QUIET_SECONDS:
            said = True
            log(f"another process indexes {indexed.name}; waiting for it")


def _write(folder: Path, indexed: IndexedSet, needs_table: bool, progress: Progress, alive: Callable[[], None]) -> None:
    temporary = folder / f".{OFFSETS}.{socket.gethostname()}-{os.getpid()}"
    table = temporary.with_name(f"{temporary.name}.classes")
    try:
        # Renamed, not synced to the disk: an index that a crash tears is found to be damaged, and made again.
        classes = write_index(temporary, indexed, progress, alive)
        if needs_table:
            with open_new(table) as file:
                file.writelines(map(class_line, _table(classes)))
            table.replace(folder / CLASSES)
        temporary.replace(folder / OFFSETS)
    finally:
        for path in (temporary, table):
            with suppress(OSError):  # a read-only file system refuses to remove even what is not there
                path.unlink()


def _table(classes: Classes) -> Iterator[dict[str, Any]]:
    for number, samples in enumerate(classes.samples.tolist()):
        name = str(number) if classes.names is None else classes.names[number]
        yield {"id": number, "name": name, "samples": samples}
