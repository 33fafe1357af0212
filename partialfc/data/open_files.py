"""Files that are read at random by position; a bounded number of them is open at a time."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any

from partialfc.files import open_regular

_MOST_OPEN = 1 << 16  # where the system sets no limit


class OpenFiles:
    """Files by their numbers, opened when they are first needed; pickled, they travel as their paths.

    At most half of the files that the process may have open are: beyond, the one opened first is closed.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = _MOST_OPEN if limit == resource.RLIM_INFINITY else max(1, limit // 2)
        self._files: dict[int, RawIOBase] = {}

    def descriptor(self, number: int) -> int:
        """Return the descriptor of a file, for ``os.pread`` before another one is asked for.

        Raises:
            OSError: it cannot be opened, or is no regular file.
        """
        file = self._files.get(number)
        if file is None:
            if len(self._files) >= self._most:
                self._files.pop(next(iter(self._files))).close()
            file = self._files[number] = open_regular(self.paths[number]).detach()
        return file.fileno()

    def close(self) -> None:
        """Close all files; they are opened again when they are needed."""
        while self._files:
            self._files.popitem()[1].close()

    def __getstate__(self) -> Sequence[Path]:
        return self.paths

    def __setstate__(self, state: Any) -> None:
        self.__init__(state)  # type: ignore[misc]

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()
