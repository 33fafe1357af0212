"""Requests to stop: the file ``stop`` in the run folder, SIGTERM, SIGUSR1 and Ctrl-C.

The first line of the file may say who asks and why, in free words. A launcher, which will start the run again, adds the
line ``stopped_by: launcher``. A file without such a line was left by a person.

A request only sets a field. The training loop reads it between steps and shares it with the other ranks in the
all-reduce that decides on the step, so that all stop after the same one; a signal handler does nothing else.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import FrameType

from partialfc.tracking.console import log

STOP_FILE = "stop"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_LOOK_EVERY = 0.5  # seconds between looks for the file, which may lie on a network


class StoppedBy(StrEnum):
    """Who asked a run to stop: ``stopped_by`` in ``state.json``."""

    PERSON = "person"  # left the file ``stop``, or pressed Ctrl-C
    SIGNAL = "signal"  # SIGTERM or SIGUSR1, sent to a rank
    LAUNCHER = "launcher"  # launch/torchrun.sh or a job script has received SIGTERM or SIGUSR1


@dataclass(frozen=True)
class StopCause:
    """Who asked a run to stop, as a field for programs and in words for people."""

    by: StoppedBy
    reason: str  # one line

    def to_text(self) -> str:
        """Return the content of a file ``stop``."""
        return f"{self.reason}\nstopped_by: {self.by}\n"

    @classmethod
    def from_text(cls, text: str) -> StopCause:
        """Read the content of a file ``stop``, which may hold anything or nothing."""
        lines = [line.strip() for line in text.split("\n")]
        return cls(next((by for by in StoppedBy if f"stopped_by: {by}" in lines), StoppedBy.PERSON), lines[0])


class StopRequest:
    """A request to stop this process.

    Args:
        folder: the run folder, whose file ``stop`` is a request too; None: this rank does not look for the file.
    """

    def __init__(self, folder: Path | None) -> None:
        self.cause: StopCause | None = None
        self._file = folder / STOP_FILE if folder else None
        self._looked = -_LOOK_EVERY

    @property
    def requested(self) -> bool:
        """True once a stop is requested; looks for the file at most every half second."""
        if self.cause is None and self._file is not None and time.monotonic() - self._looked >= _LOOK_EVERY:
            with suppress(OSError):  # a network file system that does not answer now may answer the next time
                if self._file.exists():
                    self.cause = _cause_in(self._file)
            self._looked = time.monotonic()
        return self.cause is not None

    def request(self, cause: StopCause) -> None:
        """Ask this process to stop; only the first cause counts."""
        self.cause = self.cause or cause

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
                signal.signal(number, handler if self.cause is None else signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.cause is not None:
            raise KeyboardInterrupt
        by = StoppedBy.PERSON if number == signal.SIGINT else StoppedBy.SIGNAL
        self.request(StopCause(by, signal.Signals(number).name))


def _cause_in(file: Path) -> StopCause:
    """Return the cause that the file holds, with its path."""
    text = ""
    with suppress(OSError), file.open(encoding="utf-8", errors="replace") as opened:
        text = opened.read(1000)
    cause = StopCause.from_text(text)
    words = cause.reason[:200]
    return replace(cause, reason=f"{words} (the file {file})" if words else f"the file {file}")
