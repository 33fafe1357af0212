"""``samples.index``: of these very shards, checked before it is believed, and never needed."""

from __future__ import annotations

import json
import os
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest

from partialfc.data import indexing, offsets
from partialfc.data.dataset import TarDataset
from partialfc.data.offsets import HEADER_BYTES, OFFSETS, Layout, entries_check, header_digest
from partialfc.errors import DataUnavailable
from tests.harness.data_sets import edit_json, forget_digests, png, write_samples


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
    monkeypatch.setattr("partialfc.data.indexing.walk_samples", lambda path: pytest.fail("walked the shard again"))
    assert len(TarDataset(folder)) == 3


DAMAGES = {
    "emptied": lambda content: b"",
    "something else": lambda content: b"no index",
    "header only": lambda content: content[:HEADER_BYTES],
    "cut": lambda content: content[:-3],
    "longer": lambda content: content + b"x",
    "not JSON": lambda content: content.replace(b"{", b"[", 1),
    "not an object": lambda content: b"[1]".ljust(HEADER_BYTES) + content[HEADER_BYTES:],
    "numbers too large": lambda content: content.replace(b'"num_samples": 25', b'"num_samples": 9e999', 1),
    "fewer samples": lambda content: content.replace(b'"num_samples": 25', b'"num_samples": 24', 1),
    "negative": lambda content: content.replace(b'"num_samples": 25', b'"num_samples": -1', 1),
    "a stamp": lambda content: _flipped(content, HEADER_BYTES + 9),
    "a check": lambda content: _flipped(content, HEADER_BYTES + 3 * 32),
    "a label": lambda content: _flipped(content, HEADER_BYTES + 3 * 32 + 8),
    "a place": lambda content: _flipped(content, HEADER_BYTES + 3 * 32 + 8 + 25 * 8),
    "an end of a key": lambda content: _flipped(content, HEADER_BYTES + 3 * 32 + 8 + 2 * 25 * 8),
}


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str) -> None:
    labels = [i * 7 % 4 for i in range(25)]
    folder = write_samples(tmp_path / "d", labels, samples_per_shard=10)
    TarDataset(folder)
    cache = folder / OFFSETS
    intact = cache.read_bytes()
    cache.write_bytes(DAMAGES[damage](intact))
    assert cache.read_bytes() != intact
    data = TarDataset(folder)
    assert (data.labels.tolist(), data.read(24), data.key(24)) == (labels, png(24), "s0024")
    assert cache.read_bytes() == intact


@pytest.mark.parametrize("section", [2, 3, 4, 5])
def test_damage_in_a_large_index_is_found_when_a_sample_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: int
) -> None:
    monkeypatch.setattr(offsets, "_CHECKED_AT_OPEN", 0)
    monkeypatch.setattr(offsets, "SAMPLES_A_CHECK", 2)
    monkeypatch.setattr(indexing, "SAMPLES_A_CHECK", 2)
    folder = write_samples(tmp_path / "d", [0, 1, 2, 3])
    TarDataset(folder)
    cache = folder / OFFSETS
    end = Layout(1, 4, 4 * 5).ends()[section + 1]
    cache.write_bytes(_flipped(cache.read_bytes(), end - 1))
    data = TarDataset(folder)
    assert (data.read(1), data.key(1), data.labels_of(np.array([1, 0])).tolist()) == (png(1), "s0001", [1, 0])
    with pytest.raises(DataUnavailable, match=r"samples\.index is damaged from sample 2 on"):
        data.key(3)
    assert TarDataset(folder).labels.tolist() == [0, 1, 2, 3], "the next start makes it again"


@pytest.mark.parametrize(
    ("section", "values"),
    [(2, [0, 9]), (2, [0, -1]), (3, [0, 2**46]), (3, [0, 2**63 - 1]), (4, [-1, 10]), (4, [5, 2**40]), (4, [6, 5])],
)
def test_a_forged_index_gives_no_sample_outside_of_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: int, values: list[int]
) -> None:
    folder = write_samples(tmp_path / "d", [0, 1])
    TarDataset(folder)
    forge(folder / OFFSETS, section, values)
    data = TarDataset(folder)
    with pytest.raises(DataUnavailable, match="is damaged"):
        [(data.num_bytes(i), data.key(i)) for i in range(2)]
    if section == 2:
        forge(folder / OFFSETS, section, values) if (folder / OFFSETS).exists() else None
        for look in (lambda: data.labels, lambda: data.labels_of(np.array([0, 1]))):
            with pytest.raises(DataUnavailable, match="is damaged"):
                look()


def forge(path: Path, section: int, values: list[int]) -> None:
    """Write other values into an index of two samples, with checks that agree."""
    content = bytearray(path.read_bytes())
    header = json.loads(content[:HEADER_BYTES])
    ends = Layout(1, 2, header["key_bytes"]).ends()
    content[ends[section] : ends[section + 1]] = np.array(values, dtype="<i8").tobytes()
    check = entries_check(*(bytes(content[start : start + 16]) for start in ends[2:5]))
    content[ends[1] : ends[1] + 4] = check.to_bytes(4, "little")
    header["check"] = header_digest(header, bytes(content[HEADER_BYTES : ends[2]]))
    content[:HEADER_BYTES] = json.dumps(header).encode().ljust(HEADER_BYTES)
    path.write_bytes(content)


def test_an_index_in_use_travels_to_other_processes_as_its_path(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "d", list(range(4)) * 500)
    data = TarDataset(folder)
    travelling = pickle.dumps(data)
    assert len(travelling) < 2000, "without the index"
    copy = pickle.loads(travelling)
    assert copy.labels.tolist() == data.labels.tolist()
    (folder / OFFSETS).unlink()
    with pytest.raises(DataUnavailable, match="replaced or removed"):
        pickle.loads(travelling)


def test_digests_of_keys_and_labels_are_equal_for_equal_ones_only(tmp_path: Path) -> None:
    first = TarDataset(write_samples(tmp_path / "a", [0, 1, 2], samples_per_shard=1)).content
    assert TarDataset(write_samples(tmp_path / "b", [0, 1, 2])).content == first
    assert TarDataset(write_samples(tmp_path / "c", [0, 1, 3])).content != first


def test_two_indices_of_one_set_have_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_samples(tmp_path / "d", [0, 1, 2, 3] * 5, samples_per_shard=3)
    TarDataset(folder)
    alone = (folder / OFFSETS).read_bytes()
    (folder / OFFSETS).unlink()
    monkeypatch.setattr(indexing, "_ALONE_BYTES", 0)  # now in processes
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    TarDataset(folder)
    assert (folder / OFFSETS).read_bytes() == alone
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_a_fifo_in_the_place_of_the_cache_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "d", [0, 1, 2])
    os.mkfifo(folder / OFFSETS)
    assert TarDataset(folder).labels.tolist() == [0, 1, 2]


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "d", [0, 1, 2])
    (tmp_path / "mine").write_text("mine")
    (folder / OFFSETS).symlink_to(tmp_path / "mine")
    (folder / f".{OFFSETS}.{socket.gethostname()}-{os.getpid()}").symlink_to(tmp_path / "mine")
    TarDataset(folder)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_cache_of_more_samples_than_the_index_is_rebuilt(tmp_path: Path) -> None:
    folder, larger = write_samples(tmp_path / "d", [0, 1, 2]), write_samples(tmp_path / "e", [0, 1, 2, 3])
    TarDataset(larger)
    (folder / OFFSETS).write_bytes((larger / OFFSETS).read_bytes())
    edit_json(folder / "index.json", lambda index: index.update(source="elsewhere"))
    assert TarDataset(folder).labels.tolist() == [0, 1, 2]
