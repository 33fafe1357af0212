"""Real fonts for tests, a few light packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from partialfc.data.glyphs.fonts import DESIGNS
from partialfc.errors import DataError

NAMES = ("droid", "maruberi", "vl-gothic", "aoyagi-soseki")  # the lightest packages: 9 MB together
TINY = tuple(design for design in DESIGNS if design.name in NAMES)


@contextmanager
def fonts_or_skip() -> Iterator[None]:
    """Skip the test if fonts have to be fetched, and this machine cannot."""
    try:
        yield
    except DataError as error:
        for words in ("apt-get and dpkg-deb not found", "Failed to fetch", "resolving"):
            if words in str(error):
                pytest.skip(f"this machine has no fonts, and cannot fetch them: {words}")
        raise
