"""Lock on the W&B files of a run folder: one client process sends a run at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: there are no locks
    fcntl = None  # type: ignore[assignment]


@contextmanager
def client_lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of the run in ``folder``; yields False if another process holds it.

    The lock ends with its process. File systems without locks always yield True.
    """
    with (folder / "wandb" / "lock").open("a") as file:
        free = True
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
            except OSError:  # a file system without locks
                pass
        yield free
