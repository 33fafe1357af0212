"""Log lines and progress on the console: one live line on a terminal; in a file lines that become rarer."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

_LINE_SECONDS = 10.0, 300.0  # between progress lines in a file: at least, at most
_LINE_SHARE = 1 / 20  # of the time so far: a line every 10 s for three minutes, every 5 minutes after 100
_PACE_SECONDS = 60.0  # over which a speed is averaged

# Characters that a terminal obeys, or that cannot be printed: controls, changes of direction, halves of UTF-16 pairs.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return ``text`` with control characters as escapes (``\\x1b``), except line breaks and tabs.

    For texts from files and names of files, which others may have written.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def log(message: str) -> None:
    """Print one log line: local time, then the message, made :func:`printable`."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {printable(message)}", flush=True)


def duration(seconds: float) -> str:
    """Format a duration: ``42s``, ``3m05s``, ``7h12m``, ``2d03h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_bytes(num_bytes: float) -> str:
    """Format a number of bytes: ``512.0 bytes``, ``1.5 MiB``, ``12,345.6 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"


class Advance(Protocol):
    """Function that counts items done: ``advance(3)`` after three more; the last ``note`` is shown after the ETA."""

    def __call__(self, items: int = 1, note: str = "") -> None: ...


class Pace:
    """Current speed of work: a mean over its last minute or so, weighted by an exponential that forgets."""

    def __init__(self) -> None:
        self._items = self._seconds = 0.0  # forgotten in part

    def add(self, items: int, seconds: float) -> None:
        """Record that ``items`` took ``seconds``."""
        kept = math.exp(-seconds / _PACE_SECONDS)
        self._items = kept * self._items + items
        self._seconds = kept * self._seconds + seconds

    def seconds_for(self, items: int) -> float | None:
        """Return the time that ``items`` take at the current speed; None if there is none yet."""
        return items * self._seconds / self._items if self._items > 0 else None

    @property
    def per_second(self) -> float:
        """Items per second; 0 if nothing is done yet."""
        return self._items / self._seconds if self._seconds > 0 else 0.0


class Progress(Protocol):
    """Display that long work reports to: ``with progress("rendering", total=100) as advance: ...; advance()``.

    Args:
        what: the work, in a word or two.
        total: number of items.
        done: items done earlier, by a run that resumes.
        pace: speed that the caller records, with pauses left out; None: measured here.
    """

    def __call__(
        self, what: str, total: int, done: int = 0, pace: Pace | None = None
    ) -> AbstractContextManager[Advance]: ...


@contextmanager
def no_progress(what: str, total: int, done: int = 0, pace: Pace | None = None) -> Iterator[Advance]:
    """Show nothing (a :class:`Progress`)."""

    def advance(items: int = 1, note: str = "") -> None:
        pass

    yield advance


@contextmanager
def console_progress(what: str, total: int, done: int = 0, pace: Pace | None = None) -> Iterator[Advance]:
    """Show ``what`` with count, speed and ETA on stdout (a :class:`Progress`)."""
    display = _Display(what, total, done, pace)
    try:
        yield display.advance
    finally:
        display.end()


class _Display:
    """The progress of one piece of work on stdout."""

    def __init__(self, what: str, total: int, done: int, pace: Pace | None) -> None:
        self._what, self._total, self._first, self._done = what, total, done, done
        self._pace, self._measures = pace or Pace(), pace is None
        self._live = sys.stdout.isatty()
        self._started = self._advanced = time.monotonic()
        self._shown = -math.inf if self._live else self._started
        self._note = ""

    def advance(self, items: int = 1, note: str = "") -> None:
        now = time.monotonic()
        self._done += items
        self._note = note or self._note
        if self._measures:
            self._pace.add(items, now - self._advanced)
        self._advanced = now
        if self._live and (now - self._shown >= 0.1 or self._done >= self._total):
            self._shown = now
            print(f"\r\x1b[K{printable(self._line(now))}", end="", flush=True)
        elif not self._live and now - self._shown >= _line_interval(now - self._started) and self._done < self._total:
            self._shown = now
            log(self._line(now))

    def end(self) -> None:
        if self._live:
            print("\r\x1b[K", end="")
        line = self._line(time.monotonic())
        log(line if self._done >= self._total else f"{line}  (stopped)")

    def _line(self, now: float) -> str:
        share = f"{self._done:,}/{self._total:,} ({100 * self._done / max(self._total, 1):.0f}%)"
        left = self._pace.seconds_for(self._total - self._done)
        if self._done < self._total and left is not None:
            rate, when = self._pace.per_second, f"ETA {duration(left)}"
        else:
            elapsed = now - self._started
            rate, when = (self._done - self._first) / elapsed if elapsed > 0 else 0.0, f"in {duration(elapsed)}"
        text = f"{self._what}  {share}  {rate:,.{1 if rate < 10 else 0}f}/s  {when}"
        return f"{text}  {self._note}" if self._note else text


def _line_interval(elapsed: float) -> float:
    """Return the seconds between two lines in a file, after ``elapsed`` seconds of work."""
    least, most = _LINE_SECONDS
    return min(max(least, _LINE_SHARE * elapsed), most)
