"""The place of a run folder, which somebody may remove or rename while the run trains."""

from __future__ import annotations

import os
from pathlib import Path


class Place:
    """A folder, known by more than its path.

    Args:
        folder: the run folder.
        kept: a file in it that stays there as long as the run trains.
    """

    def __init__(self, folder: Path, kept: str) -> None:
        self.path = folder
        self._kept = kept
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def lost(self) -> str:
        """Return what has become of the folder, ``""`` while it is in its place, or where that cannot be told."""
        try:
            os.stat(self.path / self._kept)
            if os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                return ""
        except FileNotFoundError:
            pass
        except OSError:  # a network file system that does not answer now
            return ""
        now = self.now()
        if now and now != self.path.resolve():
            return f"{self.path} has become {now} while the run trained; rename it back to go on from its checkpoints"
        return f"{self.path} has been removed while the run trained"

    def now(self) -> Path | None:
        """Return the path that the folder has now; None if it was removed, or where that cannot be told."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
            same = os.path.samestat(os.stat(path), os.fstat(self._descriptor))
        except OSError:
            return None
        return path if same else None

    def close(self) -> None:
        os.close(self._descriptor)
