"""Log lines and progress on the console: a live line on a terminal, a line every few seconds in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


def log(message: str) -> None:
    """Print one log line: local time, then the message."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}", flush=True)


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


class Progress(Protocol):
    """Display that long work reports to: ``with progress("rendering", total=100) as advance: ...; advance()``."""

    def __call__(self, what: str, total: int) -> AbstractContextManager[Advance]: ...


@contextmanager
def no_progress(what: str, total: int) -> Iterator[Advance]:
    """Show nothing (a :class:`Progress`)."""

    def advance(items: int = 1, note: str = "") -> None:
        pass

    yield advance


@contextmanager
def console_progress(what: str, total: int, seconds_between_lines: float = 10.0) -> Iterator[Advance]:
    """Show ``what`` with count, rate and ETA on stdout (a :class:`Progress`)."""
    started = time.monotonic()
    live = sys.stdout.isatty()
    done, last_shown, last_note = 0, started if not live else 0.0, ""

    def line() -> str:
        elapsed = time.monotonic() - started
        rate = done / elapsed if elapsed > 0 else 0.0
        eta = f"ETA {duration((total - done) / rate)}" if 0 < done < total and rate > 0 else f"in {duration(elapsed)}"
        share = f"{done:,}/{total:,} ({100 * done / max(total, 1):.0f}%)"
        text = f"{what}  {share}  {rate:,.{1 if rate < 10 else 0}f}/s  {eta}"
        return f"{text}  {last_note}" if last_note else text

    def advance(items: int = 1, note: str = "") -> None:
        nonlocal done, last_shown, last_note
        done += items
        last_note = note or last_note
        now = time.monotonic()
        if live and (now - last_shown >= 0.1 or done >= total):
            last_shown = now
            print(f"\r\x1b[K{line()}", end="", flush=True)
        elif not live and now - last_shown >= seconds_between_lines and done < total:
            last_shown = now
            log(line())

    try:
        yield advance
    finally:
        if live:
            print("\r\x1b[K", end="")
        log(line() if done >= total else f"{line()}  (stopped)")
