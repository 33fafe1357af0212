"""Writes that follow no link which somebody has put in their place."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from partialfc.files import FileLock, open_append, open_new, write_atomically
from partialfc.tracking.metrics import MetricsFile


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_text("precious")
    return path


def test_a_new_file_takes_the_place_of_a_link(tmp_path: Path, precious: Path) -> None:
    for write in (lambda path: open_new(path).close(), lambda path: write_atomically(path, "new")):
        for target in (precious, tmp_path / "absent"):
            link = tmp_path / "link"
            link.unlink(missing_ok=True)
            link.symlink_to(target)
            write(link)
            assert not link.is_symlink()
    assert precious.read_text() == "precious"
    assert not (tmp_path / "absent").exists()


def test_no_link_under_the_name_of_the_temporary_file_is_followed(tmp_path: Path, precious: Path) -> None:
    for suffix in (f"{os.getpid()}", f"{os.getpid()}-{threading.get_native_id()}"):
        (tmp_path / f".state.json.{suffix}").symlink_to(precious)
    write_atomically(tmp_path / "state.json", "new")
    assert (tmp_path / "state.json").read_text() == "new"
    assert precious.read_text() == "precious"


def test_nothing_is_appended_through_a_link_or_to_what_is_no_file(tmp_path: Path, precious: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(precious)
    with pytest.raises(OSError, match="a symbolic link, not a file"):
        MetricsFile(tmp_path / "metrics.jsonl")
    (tmp_path / ".lock").symlink_to(tmp_path / "absent")
    with pytest.raises(OSError, match="a symbolic link, not a file"):
        FileLock(tmp_path / ".lock")
    assert not (tmp_path / "absent").exists()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        open_append(tmp_path / "fifo")
    assert precious.read_text() == "precious"


def test_an_appended_file_keeps_what_it_holds_and_can_be_read(tmp_path: Path, precious: Path) -> None:
    with open_append(precious) as file:
        file.write(b" metal")
        file.seek(0)
        assert file.read() == b"precious metal"
    with open_append(tmp_path / "fresh") as file:
        file.write(b"a")
    assert (tmp_path / "fresh").read_bytes() == b"a"
