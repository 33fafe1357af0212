"""The cache of offsets: of these very shards, bounded, and never needed."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from partialfc.data.dataset import TarDataset
from tests.harness.data_sets import edit_json, forget_digests, write_samples
from tests.harness.running import ENVIRONMENT


def _swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def _forget_stamp(path: Path) -> None:
    """Give a file the modification time of all others."""
    os.utime(path, ns=(10**18, 10**18))


@pytest.mark.parametrize("same_time", [False, True])
def test_shards_that_were_swapped_are_walked_again(tmp_path: Path, same_time: bool) -> None:
    folder = write_samples(tmp_path / "d", [0, 1, 2, 3], samples_per_shard=2)
    first, second = (folder / f"shard-00000{i}.tar" for i in range(2))
    for shard in (first, second) if same_time else ():
        _forget_stamp(shard)
    assert first.stat().st_size == second.stat().st_size
    assert TarDataset(folder).labels.tolist() == [0, 1, 2, 3]
    _swap(first, second)
    assert TarDataset(folder).labels.tolist() == [2, 3, 0, 1]


def test_a_label_that_was_edited_in_place_is_read_again(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "d", [0, 1, 2])
    assert TarDataset(folder).labels.tolist() == [0, 1, 2]
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(b"s0001.cls") + 512] = ord("3")
    shard.write_bytes(content)
    assert TarDataset(folder).labels.tolist() == [0, 3, 2]


def test_a_folder_without_digests_is_cached_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_samples(tmp_path / "d", [0, 1, 2])
    forget_digests(folder)
    TarDataset(folder)
    monkeypatch.setattr("partialfc.data.offsets.walk_samples", lambda path: pytest.fail("walked the shard again"))
    assert len(TarDataset(folder)) == 3


@pytest.mark.parametrize("kind", ["compressed", "stored", "promised"])
def test_a_cache_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path, kind: str) -> None:
    folder = write_samples(tmp_path / "d", [0, 1, 2])
    TarDataset(folder)
    cache = folder / "offsets.npz"
    with np.load(cache) as arrays:
        content = dict(arrays)
    size = 200 << 20
    if kind == "compressed":
        # As bzip2 has it, gigabytes of zeros are smaller than a cache may be.
        with zipfile.ZipFile(cache, "w", zipfile.ZIP_BZIP2) as archive:
            for name, array in (content | {"labels": np.zeros(size // 8, dtype=np.int64)}).items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array)
    elif kind == "stored":
        np.savez(cache, **(content | {"labels": np.zeros(size // 8, dtype=np.int64)}))
    else:  # a header that promises more than the file holds
        with zipfile.ZipFile(cache, "a") as archive, archive.open("more.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
        cache.write_bytes(cache.read_bytes().replace(b"labels.npy", b"xabels.npy").replace(b"more.npy", b"labels.npy"))
    tracemalloc.start()
    labels = TarDataset(folder).labels.tolist()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert labels == [0, 1, 2]
    assert peak < 50 << 20


def test_a_fifo_in_the_place_of_the_cache_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "d", [0, 1, 2])
    os.mkfifo(folder / "offsets.npz")
    assert TarDataset(folder).labels.tolist() == [0, 1, 2]


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "d", [0, 1, 2])
    (tmp_path / "mine").write_text("mine")
    (folder / "offsets.npz").symlink_to(tmp_path / "mine")
    (folder / f"offsets.npz.{os.getpid()}.tmp").symlink_to(tmp_path / "mine")
    TarDataset(folder)
    assert (tmp_path / "mine").read_text() == "mine"


def test_data_on_a_read_only_file_system_is_indexed_in_memory(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "d", [0, 1, 2])
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    words = ["unshare", "-rm", "sh", "-c", script, "sh", str(folder)]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    code = "import sys; from partialfc.data.dataset import TarDataset; print(TarDataset(sys.argv[1]).labels.tolist())"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run([*words, *command], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0, 1, 2]\n"
    assert not (folder / "offsets.npz").exists()


def test_a_cache_of_more_samples_than_the_index_is_rebuilt(tmp_path: Path) -> None:
    folder, larger = write_samples(tmp_path / "d", [0, 1, 2]), write_samples(tmp_path / "e", [0, 1, 2, 3])
    TarDataset(larger)
    (folder / "offsets.npz").write_bytes((larger / "offsets.npz").read_bytes())
    edit_json(folder / "index.json", lambda index: index.update(source="elsewhere"))
    assert TarDataset(folder).labels.tolist() == [0, 1, 2]
