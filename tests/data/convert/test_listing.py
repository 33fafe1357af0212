"""Listing of a source shows how far it has come."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from partialfc.data.convert import listing
from partialfc.data.convert.detect import open_source
from partialfc.data.pool import Pool
from tests.harness.converting import FIXTURES


def test_a_source_of_one_part_shows_its_records_while_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_CHUNK", 10)
    shutil.copy(FIXTURES / "faces_a" / "train.rec", tmp_path)  # without an .idx: one walk
    notes = list[tuple[int, str]]()

    @contextmanager
    def progress(*_: Any) -> Iterator[Any]:
        yield lambda items=1, note="": notes.append((items, note))

    (tmp_path / "listing").mkdir()
    with Pool(2) as pool:
        listing.make_listing(open_source(tmp_path / "train.rec"), tmp_path / "listing", pool, progress)
    assert notes == [(0, f"{number} images") for number in range(10, 61, 10)] + [(1, "60 images")]
