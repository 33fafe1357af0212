"""``index.json``: what it says is bounded, and bound to shards and class table by a digest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from partialfc.data.dataset import TarDataset, read_index
from partialfc.errors import InvalidData
from tests.harness.data_sets import edit_json, forget_digests, write_samples


def _folder(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "d", [0, 1, 2, 3, 0, 1], samples_per_shard=3)


def _shard(index: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = index["shardlist"][1]
    return found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.update(digest="0" * 64), "the digest is '0+.*', but classes.jsonl and the sha256"),
        (lambda index: _shard(index).update(sha256="0" * 64), "one of them was changed after the data set was written"),
        (lambda index: index["shardlist"].reverse(), "one of them was changed after the data set was written"),
        (lambda index: index.update(digest=3), "'digest' must be a text, got 3"),
        (lambda index: _shard(index).update(sha256=3), "sha256 of shard-000001.tar must be a text"),
        (lambda index: index.update(num_classes=10**18), "'num_classes' must be a count, got 10+"),
        (lambda index: index.update(num_classes=True), "'num_classes' must be a count, got True"),
        (lambda index: index.update(num_classes=10**4000), r"'num_classes' must be a count, got 1.{0,50}$"),
        (lambda index: _shard(index).update(nsamples=10**12), "num_samples is 6, but the shards hold 1000000000003"),
        (lambda index: _shard(index).update(url="\ud800"), r"must be the name of a file in the folder, got '\\ud800'"),
        (lambda index: _shard(index).update(url="a\0b"), "must be the name of a file in the folder"),
        (lambda index: _shard(index).update(url="shard-000000.tar"), "a shard is listed twice"),
        (lambda index: _shard(index).update(url=["x"] * 10**5), r"must be the name of a file in the folder.{0,99}$"),
    ],
)
def test_an_index_that_cannot_be_true_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    folder = _folder(tmp_path)
    TarDataset(folder)  # a cache beside it does not hide the mistake
    edit_json(folder / "index.json", change)
    with pytest.raises(InvalidData, match=words) as refused:
        TarDataset(folder)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**6, "[1", "\0", '{"num_classes": ' + "1" * 5000 + "}"])
def test_an_index_that_is_no_json_is_refused_whatever_its_depth(tmp_path: Path, text: str) -> None:
    folder = _folder(tmp_path)
    (folder / "index.json").write_text(text)
    with pytest.raises(InvalidData, match=r"index\.json cannot be read: "):
        read_index(folder)


@pytest.mark.parametrize("name", ["index.json", "classes.jsonl", "shard-000001.tar"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_file_that_is_none_is_refused_without_waiting_for_it(tmp_path: Path, name: str, kind: str) -> None:
    folder = _folder(tmp_path)
    (folder / name).unlink()
    if kind == "fifo":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises(InvalidData, match=rf"{name}.*(not a regular file|a folder, not a file)"):
        TarDataset(folder)


def test_a_file_in_the_place_of_the_folder_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "train.rec").touch()
    with pytest.raises(InvalidData, match=r"train\.rec is a file; expected a data set folder with index\.json"):
        TarDataset(tmp_path / "train.rec")


def test_an_index_of_a_terabyte_of_zeros_is_not_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    os.truncate(folder / "index.json", 1 << 40)
    with pytest.raises(InvalidData, match=r"index\.json cannot be read: larger than 33,554,432 bytes"):
        read_index(folder)


def test_a_table_that_was_changed_or_lost_is_noticed_by_the_digest(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    table = folder / "classes.jsonl"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(InvalidData, match="one of them was changed after the data set was written"):
        TarDataset(folder)
    table.unlink()
    with pytest.raises(InvalidData, match=r"classes\.jsonl is missing"):
        TarDataset(folder)


def test_a_folder_without_digests_has_one_all_the_same(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    forget_digests(folder)
    before = TarDataset(folder).digest
    assert TarDataset(folder).digest == before
    (folder / "classes.jsonl").write_text("")
    assert TarDataset(folder).digest != before
    (folder / "classes.jsonl").unlink()
    assert len(TarDataset(folder)) == 6, "an evaluation set may have no table"
