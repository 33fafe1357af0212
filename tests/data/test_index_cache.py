"""Where an index is kept, and who makes it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from partialfc.data import index_cache
from partialfc.data.dataset import TarDataset
from partialfc.data.offsets import OFFSETS
from partialfc.errors import DataUnavailable
from tests.harness.data_sets import png, write_samples
from tests.harness.running import ENVIRONMENT
from tests.harness.tars import sample_members, write_tar

READ = "import sys; from partialfc.data.dataset import TarDataset; print(TarDataset(sys.argv[1]).labels.tolist())"


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Folders that refuse locks: as root, permissions would not stop anyone."""
    refused: set[Path] = set()

    class Lock(index_cache.FileLock):
        def __init__(self, path: Path) -> None:
            if any(path.is_relative_to(folder) for folder in refused):
                raise PermissionError(13, "read-only")
            super().__init__(path)

    monkeypatch.setattr(index_cache, "FileLock", Lock)
    return refused


def test_an_index_lies_beside_the_data(tmp_path: Path, user_cache: Path) -> None:
    folder = write_samples(tmp_path / "d", [0, 1])
    TarDataset(folder)
    assert (folder / OFFSETS).exists()
    assert not user_cache.exists()


def test_the_index_of_a_read_only_folder_lies_in_the_users_cache(
    tmp_path: Path, user_cache: Path, read_only: set[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = (write_samples(tmp_path / name, [0, 1]) for name in "de")
    read_only.update((folder, other))
    assert (TarDataset(folder).read(1), TarDataset(other).read(1)) == (png(1), png(1))
    assert len(list(user_cache.rglob(OFFSETS))) == 2
    assert not list(folder.glob(f"*{OFFSETS}*"))
    monkeypatch.setattr("partialfc.data.indexing.walk_samples", lambda path: pytest.fail("walked the shard again"))
    assert TarDataset(folder).labels.tolist() == [0, 1]


def test_without_any_cache_a_temporary_folder_serves(
    tmp_path: Path, user_cache: Path, read_only: set[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_samples(tmp_path / "d", [0, 1])
    read_only.update((folder, user_cache))
    monkeypatch.setattr(index_cache.tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(DataUnavailable, match="cannot be written anywhere"):
        TarDataset(folder)
    (tmp_path / "temporary").mkdir()
    assert TarDataset(folder).read(1) == png(1)
    assert len(list((tmp_path / "temporary").rglob(OFFSETS))) == 1


def test_a_temporary_index_ends_with_its_process(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "d", [0, 1])
    (folder / f".{OFFSETS}.lock").mkdir()  # cannot be opened
    (tmp_path / "temporary").mkdir()
    environment = ENVIRONMENT | {"XDG_CACHE_HOME": "/dev/null/none", "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run([sys.executable, "-c", READ, str(folder)], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[0, 1]\n", 0), done.stderr
    assert not list((tmp_path / "temporary").iterdir())


def test_data_on_a_read_only_file_system_is_indexed_elsewhere(tmp_path: Path, user_cache: Path) -> None:
    folder = write_samples(tmp_path / "d", [0, 1, 2])
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    words = ["unshare", "-rm", "sh", "-c", script, "sh", str(folder)]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(user_cache)}
    command = [*words, sys.executable, "-c", READ, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[0, 1, 2]\n", 0), done.stderr
    assert not (folder / OFFSETS).exists()
    assert len(list(user_cache.rglob(OFFSETS))) == 1


def test_a_link_in_the_place_of_the_folder_of_an_index_is_not_followed(tmp_path: Path, user_cache: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", sample_members([0, 1]))
    (tmp_path / "mine").mkdir()
    index_cache.beside([shard]).symlink_to(tmp_path / "mine")
    assert TarDataset(shard).labels.tolist() == [0, 1]
    assert not list((tmp_path / "mine").iterdir())
    assert len(list(user_cache.rglob(OFFSETS))) == 1


HOLD = """
import sys, time
from pathlib import Path
from partialfc.data import index_cache
def write(*_, alive, **__):
    print("indexing", flush=True)
    time.sleep(float(sys.argv[2]))
    {end}
index_cache._write, write_truly = write, index_cache._write
from partialfc.data.dataset import TarDataset
TarDataset(sys.argv[1])
"""


def hold(folder: Path, seconds: float, end: str) -> subprocess.Popen[str]:
    """Start a process that has begun to index ``folder``, and after ``seconds`` does what ``end`` says."""
    command = [sys.executable, "-c", HOLD.format(end=end), str(folder), str(seconds)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "indexing\n"
    return process


def test_one_process_makes_the_index_and_the_others_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_samples(tmp_path / "d", [0, 1])
    with hold(folder, 0.5, "write_truly(*_, alive=alive, **__)") as other:
        monkeypatch.setattr("partialfc.data.indexing.walk_samples", lambda path: pytest.fail("walked beside the other"))
        assert TarDataset(folder).labels.tolist() == [0, 1]
    assert other.returncode == 0
    assert not list(folder.glob(".samples*"))


def test_a_process_that_dies_while_indexing_is_followed_by_a_waiting_one(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "d", [0, 1])
    with hold(folder, 60, "") as other:
        (folder / f".{OFFSETS}.there-1").write_text("half an index")
        threading.Timer(0.3, other.kill).start()
        assert TarDataset(folder).labels.tolist() == [0, 1]
    assert not list(folder.glob(".samples*"))


def test_a_process_that_stops_while_indexing_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_samples(tmp_path / "d", [0, 1])
    monkeypatch.setattr(index_cache, "_SILENT_SECONDS", 0.3)
    monkeypatch.setattr(index_cache, "_WAIT_SECONDS", 0.1)
    with hold(folder, 60, "") as other:
        with pytest.raises(DataUnavailable, match="has not gone on indexing"):
            TarDataset(folder)
        other.kill()


def test_the_index_of_a_host_is_not_that_of_another(
    tmp_path: Path, user_cache: Path, read_only: set[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_samples(tmp_path / "d", [0, 1])
    read_only.add(folder)
    for host in ("one", "two"):
        monkeypatch.setattr(index_cache.socket, "gethostname", lambda host=host: host)
        TarDataset(folder)
    assert len(list(user_cache.rglob(OFFSETS))) == 2
