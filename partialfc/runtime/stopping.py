"""Requests to stop: the file ``stop`` in the run folder, SIGTERM, SIGUSR1 and Ctrl-C. The file may say who asks.

A request only leaves word. The training loop reads it between steps and tells the other ranks with the verdict on the
step, so that all of them stop after the same one; nothing is done inside a signal handler.
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
    """Whether this process has been asked to stop.

    Args:
        folder: the run folder whose file ``stop`` is a request, too; None: nobody looks for it here.
    """

    def __init__(self, folder: Path | None) -> None:
        self.reason: str | None = None  # who asked, in words
        self._file = folder / STOP_FILE if folder else None
        self._looked = -_LOOK_EVERY

    @property
    def requested(self) -> bool:
        """Whether somebody has asked."""
        if self.reason is None and self._file is not None and time.monotonic() - self._looked >= _LOOK_EVERY:
            with suppress(OSError):  # a network that does not answer now; the next look will tell
                if self._file.exists():
                    self.reason = _who_asks(self._file)
            self._looked = time.monotonic()
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask this process to stop; the first reason is kept."""
        self.reason = self.reason or reason

    def done(self) -> None:
        """The run has ended: the file has served. It may be a folder, or one that may not be removed."""
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
        """Within, signals are requests. A second Ctrl-C ends the process as usual; other signals may repeat, also while
        a process that has stopped as asked comes to its end.
        """
        if threading.current_thread() is not threading.main_thread():  # Python hands signals to no other
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if self.reason is None else signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)


def _who_asks(file: Path) -> str:
    """The words in the file, if there are any: a launcher leaves its own."""
    words = ""
    with suppress(OSError), file.open(encoding="utf-8", errors="replace") as text:
        words = text.readline(200).strip()
    return f"{words} (the file {file})" if words else f"the file {file}"
