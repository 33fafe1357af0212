"""Requests to stop: the file ``stop`` in the run folder, SIGTERM, SIGUSR1 and Ctrl-C. The file may say who asks.

A request only sets a field. The training loop reads it between steps and shares it with the other ranks in the
all-reduce that decides on the step, so that all stop after the same one; a signal handler does nothing else.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from partialfc.tracking.console import log

STOP_FILE = "stop"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_LOOK_EVERY = 0.5  # seconds between looks for the file, which may lie on a network


class StopRequest:
    """A request to stop this process.

    Args:
        folder: the run folder, whose file ``stop`` is a request too; None: this rank does not look for the file.
    """

    def __init__(self, folder: Path | None) -> None:
        self.reason: str | None = None  # names who asked
        self._file = folder / STOP_FILE if folder else None
        self._looked = -_LOOK_EVERY

    @property
    def requested(self) -> bool:
        """True once a stop is requested; looks for the file at most every half second."""
        if self.reason is None and self._file is not None and time.monotonic() - self._looked >= _LOOK_EVERY:
            with suppress(OSError):  # a network file system that does not answer now may answer the next time
                if self._file.exists():
                    self.reason = _reason_in(self._file)
            self._looked = time.monotonic()
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask this process to stop; only the first reason counts."""
        self.reason = self.reason or reason

    def remove_file(self) -> None:
        """Remove the file ``stop`` of a run that has ended; log a warning if that fails."""
        if self._file is None:
            return
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            log(
                f"WARNING: {self._file} cannot be removed ({error.strerror}); remove it yourself, or the next start "
                "stops after one step"
            )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn signals into requests inside the context. A second Ctrl-C ends the process as usual; other signals may
        repeat, even while a process that has stopped on request is ending.
        """
        if threading.current_thread() is not threading.main_thread():  # only this one may have handlers in Python
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler if self.reason is None else signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)


def _reason_in(file: Path) -> str:
    """Return the first line of the file, where a launcher or a person may give a reason, and its path."""
    words = ""
    with suppress(OSError), file.open(encoding="utf-8", errors="replace") as text:
        words = text.readline(200).strip()
    return f"{words} (the file {file})" if words else f"the file {file}"
