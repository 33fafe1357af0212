"""Progress of long work on the console, and texts that a terminal would obey."""

from __future__ import annotations

import itertools
import re
import time
from types import SimpleNamespace

import pytest

from partialfc.tracking import console
from partialfc.tracking.console import Pace, console_progress, log, printable


class Clock:
    """A clock that a test moves, in place of the module ``time``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: self.now, strftime=time.strftime))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines without their times."""
    return [line[21:] for line in capsys.readouterr().out.splitlines()]


def test_resumed_work_counts_from_its_start_and_its_eta_from_its_speed(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with console_progress("training", 500, done=214) as advance:
        for _ in range(286):
            clock.now += 1
            advance()
    shown = printed(capsys)
    assert shown[0] == "training  224/500 (45%)  1.0/s  ETA 4m36s"
    assert shown[-1] == "training  500/500 (100%)  1.0/s  in 4m46s"


def test_the_eta_follows_the_current_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress("training", 3_000) as advance:
        for step in range(2_000):
            clock.now += 1 if step < 1_000 else 0.1
            advance()
    last = printed(capsys)[-2]
    rate = float(re.findall(r"([\d.]+)/s", last)[0])
    assert rate > 7, "ten a second, not the two of all steps so far"


def test_a_pause_that_the_caller_leaves_out_is_not_slowness(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    pace = Pace()
    with console_progress("training", 1_000, pace=pace) as advance:
        for step in range(500):
            clock.now += 600 if step == 400 else 1  # an evaluation
            pace.add(1, 1.0)
            advance()
    assert "ETA 8m20s" in printed(capsys)[-1], "500 steps of a second"


def test_lines_in_a_file_become_rarer(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    times = []
    with console_progress("training", 10**9) as advance:
        begin = clock.now
        while clock.now < begin + 7 * 86_400:
            clock.now += 10
            advance()
            if capsys.readouterr().out:
                times.append(clock.now - begin)
    assert times[:3] == [10, 20, 30]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 300
    assert len(times) < 2_200, "a line every ten seconds would be 60,480"


def test_on_a_terminal_there_is_one_live_line_and_one_in_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as terminal:
        terminal.setattr("sys.stdout.isatty", lambda: True, raising=False)
        with console_progress("training", 1_000) as advance:
            for _ in range(1_000):
                clock.now += 60
                advance(note="\x1b]0;title\x07")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "\x1b]" not in out
    assert "\x07" not in out


def test_work_that_is_cut_short_says_so(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress("training", 500, done=214) as advance:
        clock.now += 1
        advance()
    assert printed(capsys) == ["training  215/500 (43%)  1.0/s  ETA 4m45s  (stopped)"]
    with console_progress("training", 500, done=214):
        pass
    assert printed(capsys) == ["training  214/500 (43%)  0.0/s  in 0s  (stopped)"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("\x9b31m", r"\x9b31m"),
        ("a\rb\x08\x7f", r"a\rb\x08\x7f"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\udcff", r"\udcff"),
        ("two\n\tlines", "two\n\tlines"),
        ("Zoë 漢字 की 👩‍🚀", "Zoë 漢字 की 👩‍🚀"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(text) == shown
    log(text)
    assert capsys.readouterr().out.endswith(f"{shown}\n")
