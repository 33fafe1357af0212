"""Lock on the W&B files of a run folder: one client process sends a run at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from partialfc.files import FileLock


@contextmanager
def client_lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of the run in ``folder``; yields False if another process holds it."""
    lock = FileLock(folder / "wandb" / "lock")
    try:
        yield lock.acquire()
    finally:
        lock.release()
