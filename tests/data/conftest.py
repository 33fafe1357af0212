"""Fixtures of the tests of data."""

from __future__ import annotations

from pathlib import Path

import pytest

from partialfc.data.glyphs import fonts, render
from partialfc.data.glyphs.fonts import FontFile, fetch_fonts
from tests.harness.fonts import TINY, fonts_or_skip

BLOCKS = (((0x4E00, 0x52FF),), ((0x5300, 0x54FF),))


@pytest.fixture(scope="session")
def font_files() -> dict[str, tuple[FontFile, ...]]:
    """Four real fonts, from the packages; kept in the user's cache between runs."""
    with fonts_or_skip():
        return fetch_fonts(TINY)


@pytest.fixture
def tiny(font_files: dict[str, tuple[FontFile, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four designs and a few hundred characters instead of dozens and tens of thousands."""
    monkeypatch.setattr(fonts, "DESIGNS", TINY)
    monkeypatch.setattr(render, "HAN_BLOCKS", BLOCKS)


@pytest.fixture
def no_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", tmp_path / "nothing-installed")
    return tmp_path / "cache"
