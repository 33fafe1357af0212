"""Files that are read by position, and how many of them are open."""

from __future__ import annotations

import os
import pickle
import resource
from pathlib import Path

import pytest

from partialfc.data.open_files import OpenFiles


def test_any_number_of_files_is_read_while_few_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
    paths = [tmp_path / str(number) for number in range(20)]
    for path in paths:
        path.write_text(path.name)
    files = OpenFiles(paths)
    for number in [*range(20), 0, 19, 0]:
        assert os.pread(files.descriptor(number), 9, 0).decode() == str(number)
        assert len(open_below(tmp_path)) <= 4
    copy = pickle.loads(pickle.dumps(files))
    files.close()
    assert not open_below(tmp_path)
    assert os.pread(copy.descriptor(7), 9, 0) == b"7"
    del copy
    assert not open_below(tmp_path)


def open_below(folder: Path) -> list[str]:
    """Return the files below a folder that this process has open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # of the listing itself
            continue
    return [path for path in found if path.startswith(str(folder))]
