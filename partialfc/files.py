"""The package's file lock, atomic write and careful read."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from partialfc.errors import DataError, DataUnavailable, InvalidData

_POLL_SECONDS = 0.2
# Of disks, file servers and processes in trouble; not every system has all of them.
_PASSING_NAMES = "EIO ESTALE ETIMEDOUT EREMOTEIO ENOTCONN ECONNRESET EHOSTDOWN EMFILE ENFILE ENOMEM EAGAIN EBUSY EINTR"
_PASSING = frozenset(getattr(errno, name) for name in _PASSING_NAMES.split() if hasattr(errno, name))


def open_regular(path: Path | str) -> io.BufferedReader:
    """Open a file for reading, if it is a regular one: a FIFO would wait for a writer, a device may never end.

    Raises:
        OSError: it cannot be opened or is not a regular file; ``strerror`` says which, in words for a message.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "a folder, not a file")
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def unreadable(path: Path | str, error: OSError) -> DataError:
    """Return the error to raise for a file of a data set that cannot be read: :class:`DataUnavailable` if the next
    start may find it well (a disk or a file server in trouble, too many open files), else :class:`InvalidData`.
    """
    kind = DataUnavailable if error.errno in _PASSING else InvalidData
    return kind(f"{path} cannot be read: {error.strerror or error}")


def read_bounded(path: Path | str, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger; ``strerror`` says which, for a message.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # A sparse file is large at once, a growing one only later.
        content = b"" if size > limit else file.read(limit + 1)
    if max(size, len(content)) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes")
    return content


def read_json(path: Path | str, limit: int) -> Any:
    """Return the value of a regular JSON file of at most ``limit`` bytes.

    Raises:
        OSError: as :func:`read_bounded`.
        ValueError: it is not JSON, or is nested too deeply.
    """
    return parse_json(read_bounded(path, limit))


def parse_json(text: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace ``path`` as a whole: after a crash it holds the old content or the new one. Text is written as UTF-8.

    Raises:
        OSError: the file cannot be written; ``path`` is unchanged.
    """
    # Several processes and threads may write the same file: each has its own temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}")
    try:
        with open_new(temporary) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        with suppress(OSError):  # some file systems cannot sync a folder
            sync_to_disk(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def open_new(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a new file for writing; a file or link of this name is removed first, and its target left alone.

    Args:
        buffering: bytes of the buffer; -1 is Python's choice.

    Raises:
        OSError: it cannot be created.
    """
    path.unlink(missing_ok=True)
    return path.open("x+b", buffering)


def open_append(path: Path) -> BinaryIO:
    """Open a regular file for appending and reading, unbuffered; create it if it is missing.

    Raises:
        OSError: it cannot be opened, or is a symbolic link or no regular file; ``strerror`` says which, for a message.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link, not a file") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return open(descriptor, "a+b", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def sync_to_disk(path: Path) -> None:
    """Sync a file's content, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FileLock:
    """An exclusive lock between processes, held until :meth:`release` or the end of the process, however it ends.

    It belongs to the process: forked children do not inherit it, and a second lock on the same file in the same process
    is granted. Where the file system has no locks, every lock is granted and :attr:`unsupported` says why.

    Args:
        path: file to lock, created if missing; its content does not matter.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waited = False  # another process held it
        self.unsupported = ""
        self._file = open_append(path)

    def acquire(self, timeout: float = 0.0, on_wait: Callable[[], None] | None = None) -> bool:
        """Take the lock, or return False if another process still holds it after ``timeout`` seconds.

        Args:
            on_wait: called once, if another process holds the lock.
        """
        deadline = time.monotonic() + timeout
        while not self._try():
            if time.monotonic() >= deadline:
                return False
            if on_wait and not self.waited:
                on_wait()
            self.waited = True
            time.sleep(_POLL_SECONDS)
        return True

    def release(self) -> None:
        """Let other processes take the lock."""
        self._file.close()

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            self.unsupported = os.strerror(error.errno or 0)
        return True
