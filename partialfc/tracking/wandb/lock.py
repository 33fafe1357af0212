"""Who follows a run folder for W&B: one process at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody locks
    fcntl = None  # type: ignore[assignment]

_POLL = 0.2  # seconds


@contextlib.contextmanager
def alone(folder: Path, patience: float) -> Iterator[bool]:
    """Wait until nobody else follows the run in ``folder``, but not for ever; whether that came true in time.

    The lock ends with the process that holds it, however that ends.
    """
    with (folder / "wandb" / "lock").open("a") as file:
        deadline = time.monotonic() + patience
        got = fcntl is None
        while not got:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                got = True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(_POLL)
            except OSError:  # a file system without locks
                got = True
        yield got
