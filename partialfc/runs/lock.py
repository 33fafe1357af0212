"""One run at a time in a run folder."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from partialfc.errors import ConfigError
from partialfc.tracking.console import log

LOCK = ".lock"


class FolderLock:
    """Held by the first rank for as long as its process lives; a process that dies leaves nothing behind.

    A run that a launcher starts again may find its predecessor about to end, so the lock is waited for. Where the file
    system knows no locks, there is none. ``waited`` tells whether another process had it.

    Args:
        patience: seconds.

    Raises:
        ConfigError: another process keeps it.
    """

    def __init__(self, folder: Path, patience: float) -> None:
        self._file = (folder / LOCK).open("a")
        deadline = time.monotonic() + patience
        self.waited = False
        while not self._taken():
            if time.monotonic() > deadline:
                self._file.close()
                raise ConfigError(
                    f"run.dir: another process trains in {folder} and has not ended within {patience:g} s "
                    "(state.json says where); stop it, or choose another run.dir"
                )
            if not self.waited:
                self.waited = True
                log(f"waiting for another process that trains in {folder} to end")
            time.sleep(0.5)

    def _taken(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: loader workers do not inherit it
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            why = os.strerror(error.errno or 0)
            log(f"WARNING: {self._file.name} cannot be locked ({why}); start one run in this folder at a time")
        return True

    def release(self) -> None:
        self._file.close()
