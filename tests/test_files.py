"""The file lock between processes, the atomic write, and what an unreadable file means."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from partialfc import files
from partialfc.errors import DataError, DataUnavailable, InvalidData
from partialfc.files import FileLock, unreadable, write_atomically

_HOLD = (
    "import sys, pathlib; from partialfc.files import FileLock\n"
    "lock = FileLock(pathlib.Path(sys.argv[1])); print(lock.acquire(), flush=True); sys.stdin.readline()\n"
)


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock on ``path`` until it reads a line."""
    words = [sys.executable, "-c", _HOLD, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_a_lock_is_waited_for_and_dies_with_its_process(tmp_path: Path) -> None:
    free = FileLock(tmp_path / "free")
    assert free.acquire()
    assert not free.waited
    free.release()
    lock, calls = FileLock(tmp_path / "lock"), []
    with holder(tmp_path / "lock") as other:
        assert not lock.acquire()
        assert not lock.acquire(timeout=0.3, on_wait=lambda: calls.append("waiting"))

        def end_it() -> None:
            calls.append("ending")
            other.kill()

        lock.waited = False
        assert lock.acquire(timeout=30, on_wait=end_it)
    assert calls == ["waiting", "ending"]
    assert lock.waited


def test_a_file_system_without_locks_grants_every_lock_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", unsupported)
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    assert lock.unsupported == "No locks available"


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "é")
    write_atomically(path, path.read_bytes() * 2)
    assert path.read_text(encoding="utf-8") == "éé"

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "another")
    assert path.read_text(encoding="utf-8") == "éé"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EIO, DataUnavailable),
        (errno.ESTALE, DataUnavailable),
        (errno.EMFILE, DataUnavailable),
        (errno.EACCES, InvalidData),
        (errno.ENOENT, InvalidData),
        (errno.EFBIG, InvalidData),
    ],
)
def test_what_the_next_start_may_find_well_is_worth_one(number: int, kind: type[DataError]) -> None:
    error = unreadable("data/index.json", OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert str(error) == f"data/index.json cannot be read: {os.strerror(number)}"
