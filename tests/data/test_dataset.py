"""The data set folder: written deterministically, read at random, and not trusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partialfc.data.dataset import DatasetWriter, TarDataset
from partialfc.data.tar import ustar_header
from partialfc.data.writer import UNFINISHED
from partialfc.errors import ConfigError, DataError


def png(value: int, size: int = 8) -> bytes:
    encoded = io.BytesIO()
    Image.new("L", (size, size), value).save(encoded, "PNG")
    return encoded.getvalue()


def write_folder(folder: Path, num_samples: int = 25, num_classes: int = 4, samples_per_shard: int = 10) -> Path:
    with DatasetWriter(folder, samples_per_shard=samples_per_shard) as writer:
        for i in range(num_samples):
            writer.write(f"s{i:04d}-é", png(i), "png", i * 7 % num_classes)
        writer.finish([{"name": f"class {i}", "note": i} for i in range(num_classes)], {"source": "test"})
    return folder


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def folder_with_tar(folder: Path, write: Callable[[tarfile.TarFile], None], nsamples: int = 1) -> Path:
    """A data set folder around a hand-made tar."""
    folder.mkdir()
    with tarfile.open(folder / "shard-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        write(tar)
    return index_single_shard(folder, nsamples)


def index_single_shard(folder: Path, nsamples: int) -> Path:
    size = (folder / "shard-000000.tar").stat().st_size
    shard = {"url": "shard-000000.tar", "nsamples": nsamples, "nbytes": size, "sha256": ""}
    index = {"shardlist": [shard], "num_classes": 4, "num_samples": nsamples, "digest": "x"}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(data)
    tar.addfile(member, io.BytesIO(data))


def test_written_samples_are_read_back(tmp_path: Path) -> None:
    data = TarDataset(write_folder(tmp_path / "d"))
    assert (data.num_samples, data.num_classes, len(data), len(data.shards)) == (25, 4, 25, 3)
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [i * 7 % 4 for i in range(25)]
    assert data.keys == [f"s{i:04d}-é" for i in range(25)]
    for i in np.random.default_rng(0).permutation(25).tolist():
        assert data.read(i) == png(i)
    assert data.classes[3] == {"id": 3, "name": "class 3", "note": 3, "samples": 6}
    assert data.index["source"] == "test"


def test_shards_are_byte_for_byte_what_the_standard_library_writes(tmp_path: Path) -> None:
    for name, size in (("a.png", 0), ("u4E00-wqy-zenhei.cls", 12345), ("é.png", 8**11 - 1), ("x" * 100, 7)):
        expected = tarfile.TarInfo(name)
        expected.size, expected.mode = size, 0o644
        assert ustar_header(name, size) == expected.tobuf(tarfile.USTAR_FORMAT)
    write_folder(tmp_path / "d")
    with tarfile.open(tmp_path / "d" / "shard-000002.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:2]] == ["s0020-é.png", "s0020-é.cls"]
        assert all((m.mtime, m.uid, m.gid, m.uname, m.gname) == (0, 0, 0, "", "") for m in members)
        content = tar.extractfile("s0024-é.png")
        assert content is not None
        assert content.read() == png(24)


def test_webdataset_reads_the_folder(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="not installed: webdataset; pip install '.[dev]'")
    folder = write_folder(tmp_path / "d")
    index = json.loads((folder / "index.json").read_text())
    urls = [str(folder / shard["url"]) for shard in index["shardlist"]]
    data = TarDataset(folder)
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == data.keys
    assert [sample["png"] for sample in samples] == [data.read(i) for i in range(25)]
    assert [int(sample["cls"]) for sample in samples] == data.labels.tolist()


def test_digests_are_equal_for_equal_content_only(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    for name in ("index.json", "classes.jsonl", "shard-000000.tar", "shard-000002.tar"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    other = TarDataset(write_folder(tmp_path / "c", num_classes=5))
    assert TarDataset(first).digest == TarDataset(second).digest != other.digest


def test_a_folder_is_complete_only_after_finish(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without finish"), DatasetWriter(tmp_path / "d") as writer:
        writer.write("a", png(1), "png", 0)
    with pytest.raises(DataError, match=r"index\.json is missing"):
        TarDataset(tmp_path / "d")
    assert (tmp_path / "d" / UNFINISHED).exists()
    write_folder(tmp_path / "d")  # leftovers of an interrupted writer are no obstacle
    assert len(TarDataset(tmp_path / "d")) == 25
    assert sorted(os.listdir(tmp_path / "d")) == [
        *("classes.jsonl", "index.json", "samples.index"),
        *(f"shard-00000{i}.tar" for i in range(3)),
    ]


def test_a_folder_in_use_is_refused_and_overwritten_only_on_request(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d")
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        DatasetWriter(folder)
    assert len(TarDataset(folder)) == 25
    with DatasetWriter(folder, overwrite=True) as writer:
        writer.write("only", png(9), "png", 0)
        assert not (folder / "index.json").exists()
        writer.finish([{"name": "a"}])
    assert (len(TarDataset(folder)), (folder / "mine.txt").read_text()) == (1, "keep")
    assert len(list(folder.glob("shard-*"))) == 1


@pytest.mark.parametrize(
    ("key", "extension", "label"),
    [
        *((key, "png", 0) for key in ("a.b", "/a", "a/", "a//b", "../a", "a/../b", "", "a\0b", "x" * 97)),
        *(("a", "gif", 0), ("a", "png", -1)),
    ],
)
def test_samples_that_could_not_be_read_back_are_not_written(
    tmp_path: Path, key: str, extension: str, label: int
) -> None:
    with pytest.raises(DataError):
        DatasetWriter(tmp_path / "d").write(key, png(0), extension, label)


def test_a_label_beyond_the_class_table_is_refused_by_finish(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "d")
    writer.write("a", png(0), "png", 3)
    with pytest.raises(DataError, match="label 3"):
        writer.finish([{"name": "a"}] * 3)


def test_a_dataset_travels_to_another_process_without_open_files(tmp_path: Path) -> None:
    data = TarDataset(write_folder(tmp_path / "d"))
    assert data.read(3) == png(3)
    copy = pickle.loads(pickle.dumps(data))
    assert copy._files._files == {}
    assert copy.read(20) == png(20)
    data.close()
    assert data.read(3) == png(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("shardlist"), "shardlist"),
        (lambda index: index.update(num_classes="4"), "num_classes"),
        (lambda index: index.update(num_samples=24), "num_samples is 24, but the shards hold 25"),
        (lambda index: index.update(num_classes=3), "label 3"),
        (lambda index: index["shardlist"][0].update(nsamples=9, x=index.update(num_samples=24)), "holds? 10"),
        (lambda index: index["shardlist"][0].update(nbytes=10), "says 10 bytes"),
        (lambda index: index["shardlist"][0].update(url="missing.tar"), r"missing\.tar is missing"),
        (lambda index: index["shardlist"][0].update(url="../d/shard-000000.tar"), "name of a file in the folder"),
        (lambda index: index["shardlist"][0].update(url="/etc/passwd"), "name of a file in the folder"),
        (lambda index: index["shardlist"][0].update(url="pipe:id"), "name of a file in the folder"),
    ],
)
def test_an_index_that_does_not_fit_the_folder_is_explained(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    folder = write_folder(tmp_path / "d")
    edit_index(folder, change)
    with pytest.raises(DataError, match=message):
        TarDataset(folder)


def test_an_index_that_is_not_json_is_explained(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d")
    (folder / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json cannot be read"):
        TarDataset(folder)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../../etc/a.png", tarfile.REGTYPE, "leads out"),
        ("x/../../a.png", tarfile.REGTYPE, "leads out"),
        ("/etc/a.png", tarfile.REGTYPE, "leads out"),
        ("a.png", tarfile.SYMTYPE, "only regular files"),
        ("a.png", tarfile.LNKTYPE, "only regular files"),
        ("a.png", tarfile.CHRTYPE, "only regular files"),
    ],
)
def test_hostile_members_are_refused(tmp_path: Path, name: str, kind: bytes, message: str) -> None:
    def write(tar: tarfile.TarFile) -> None:
        add(tar, name, b"", kind, "/etc/passwd")
        add(tar, "a.cls", b"1")

    with pytest.raises(DataError, match=message):
        TarDataset(folder_with_tar(tmp_path / "d", write))


@pytest.mark.parametrize("label", [b"", b"-1", b"1.5", b"one", b"1_0", b"9" * 30, b"4", "١".encode()])
def test_labels_that_are_not_class_ids_are_refused(tmp_path: Path, label: bytes) -> None:
    def write(tar: tarfile.TarFile) -> None:
        add(tar, "a.png", png(1))
        add(tar, "a.cls", label)

    with pytest.raises(DataError, match="label"):
        TarDataset(folder_with_tar(tmp_path / "d", write))


@pytest.mark.parametrize("names", [["a.png"], ["a.cls"], ["a.png", "a.jpg", "a.cls"], ["a.png", "a.png", "a.cls"]])
def test_incomplete_and_ambiguous_samples_are_refused(tmp_path: Path, names: list[str]) -> None:
    def write(tar: tarfile.TarFile) -> None:
        for name in names:
            add(tar, name, b"1")

    with pytest.raises(DataError, match="sample 'a'"):
        TarDataset(folder_with_tar(tmp_path / "d", write))


def test_foreign_archives_with_folders_and_further_members_are_read(tmp_path: Path) -> None:
    def write(tar: tarfile.TarFile) -> None:
        add(tar, "p", b"", tarfile.DIRTYPE)
        for name, content in (
            ("a.json", b"{}"),
            ("a.cls", b"2\n"),
            ("a.JPEG", b"jpeg"),
            ("b.jpg", b"b"),
            ("b.cls", b"0"),
        ):
            add(tar, f"p/{name}", content)

    data = TarDataset(folder_with_tar(tmp_path / "d", write, nsamples=2))
    assert (data.keys, data.labels.tolist(), data.read(0)) == (["p/a", "p/b"], [2, 0], b"jpeg")


@pytest.mark.parametrize("keep", [100, 512 + 10, 512 * 2 + 40])
def test_a_truncated_shard_is_refused(tmp_path: Path, keep: int) -> None:
    folder = write_folder(tmp_path / "d", samples_per_shard=100)
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(DataError, match="bytes, the file has"):
        TarDataset(folder)
    with pytest.raises(DataError, match="truncated"):  # also when the index agrees with the damage
        TarDataset(index_single_shard(folder, 25))


def test_a_shard_that_is_not_a_tar_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", samples_per_shard=100)
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1  # a flipped bit in the first name
    shard.write_bytes(content)
    with pytest.raises(DataError, match="checksum does not match"):
        TarDataset(folder)
    shard.write_bytes(b"\xff" * len(content))
    with pytest.raises(DataError, match="not a tar header"):
        TarDataset(folder)


def test_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "d")
    expected = TarDataset(folder).keys
    monkeypatch.setattr("partialfc.data.indexing.walk_samples", lambda path: pytest.fail("walked the shard again"))
    assert TarDataset(folder).keys == expected


def test_an_empty_data_set_is_complete(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "d") as writer:
        writer.finish([])
    for _ in range(2):
        assert len(TarDataset(tmp_path / "d")) == 0
