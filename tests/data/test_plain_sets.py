"""Sets of shards without index.json: what webdataset reads is what we read; and the forms in which they are named."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from partialfc.data.class_table import class_names
from partialfc.data.dataset import TarDataset
from partialfc.data.plain import DataPath, list_shards
from partialfc.data.samples import split_name
from partialfc.errors import ConfigError, DataError, InvalidData
from tests.harness.data_sets import edit_json, png, write_samples
from tests.harness.tars import sample_members, write_tar


def read_by_webdataset(paths: list[Path], image: str = "jpg") -> list[tuple[str, bytes, bytes]]:
    webdataset = pytest.importorskip("webdataset", reason="not installed: webdataset; pip install '.[dev]'")
    samples = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False)
    return [(sample["__key__"], sample[image], sample["cls"]) for sample in samples]


def read_by_us(source: DataPath) -> list[tuple[str, bytes, bytes]]:
    data = TarDataset(source)
    return [(data.key(i), data.read(i), str(data.labels[i]).encode()) for i in range(len(data))]


def write_shards(folder: Path, labels: list[list[Any]], name: str = "train") -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [
        write_tar(folder / f"{name}-{i:03d}.tar", sample_members(part, f"{i}-", png(i)))
        for i, part in enumerate(labels)
    ]


def test_a_set_of_webdatasets_own_writer_is_read_as_webdataset_does(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="not installed: webdataset; pip install '.[dev]'")
    paths = [tmp_path / f"train-{i}.tar" for i in range(3)]
    for number, path in enumerate(paths):
        with webdataset.TarWriter(str(path)) as writer:
            for i in range(7):
                key = f"folder.{number}/{'long' * 40 if i == 3 else ''}{i}"
                writer.write({"__key__": key, "jpg": png(i), "cls": i % 5, "json": {"a": i}, "seg.png": b"mask"})
    found = read_by_us(str(tmp_path / "train-{0..2}.tar"))
    assert found == read_by_webdataset(paths)
    assert len(found) == 21


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sets_of_tarfile_are_read_as_webdataset_does(tmp_path: Path, format: int) -> None:
    prefix = "p/" + ("x" * 90 if format == tarfile.USTAR_FORMAT else "é" * 150) + "/"
    members = [
        ("README", b"about"),
        ("__meta__", b"meta"),
        *sample_members([3, 0, 3], prefix),
        ("._0001.jpg", b"of a file manager"),
        ("p/z.JPG", b"upper"),
        ("p/z.Cls", b"1"),
        ("p/z.txt", b""),
    ]
    path = write_tar(tmp_path / "a.tar", members, format)
    found = read_by_us(path)
    assert found == [sample for sample in read_by_webdataset([path]) if sample[0] != ""]
    assert [sample[0].rpartition("/")[2] for sample in found] == ["0000", "0001", "0002", "z"]


@pytest.mark.parametrize("format", ["gnu", "posix", "ustar"])
def test_a_folder_packed_by_gnu_tar_is_read_as_webdataset_does(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "files" / "0"
    folder.mkdir(parents=True)
    for i in range(5):
        (folder / f"{i}{'x' * 80}.jpg").write_bytes(png(i))
        (folder / f"{i}{'x' * 80}.cls").write_text(f"{i}\n")
    command = ["tar", f"--format={format}", "--sort=name", "-C", tmp_path / "files", "-cf", tmp_path / "a.tar", "."]
    subprocess.run(command, check=True)
    expected = [(key, image, label.strip()) for key, image, label in read_by_webdataset([tmp_path / "a.tar"])]
    assert read_by_us(tmp_path / "a.tar") == expected
    assert expected[0][0] == f"./0/0{'x' * 80}"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.png", ("a", "png")),
        ("p/a.seg.PNG", ("p/a", "seg.png")),
        ("p.q/a.b", ("p.q/a", "b")),
        ("./a.b", ("./a", "b")),
        ("a", None),
        ("p.q/a", None),
        (".a.png", None),
        ("__a__/b.png", None),
        ("__a.png", ("__a", "png")),
    ],
)
def test_names_are_split_at_the_first_dot_of_their_last_part(name: str, parts: tuple[str, str] | None) -> None:
    assert split_name(name) == parts
    splitting = pytest.importorskip("webdataset.tariterators", reason="not installed: webdataset").base_plus_ext(name)
    if not name.startswith("__a__"):  # which webdataset leaves out elsewhere
        assert splitting == (None, None) if parts is None else (splitting[0], splitting[1].lower()) == parts


def test_the_forms_of_a_set_give_the_same_set(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "d", [[0, 1], [2], [1, 0, 3]])
    folder = tmp_path / "d"
    forms: list[DataPath] = [
        folder,
        str(folder),
        f"{folder}/train-{{000..002}}.tar",
        Path(f"{folder}/train-{{000..002}}.tar"),
        "::".join(map(str, paths)),
        paths,
        [f"{folder}/train-{{000..001}}.tar", paths[2]],
    ]
    sets = [TarDataset(form) for form in forms]
    assert {tuple(data.labels) for data in sets} == {(0, 1, 2, 1, 0, 3)}
    assert len({data.digest for data in sets}) == 1
    assert len(list(folder.glob("partialfc-index-*"))) == 1, "one index serves all"
    assert read_by_us(paths[2]) == read_by_us(folder)[3:]


def test_the_index_of_a_set_serves_after_the_set_has_moved(tmp_path: Path) -> None:
    digest = TarDataset(write_shards(tmp_path / "d", [[0, 1], [2]])).digest
    (tmp_path / "d").rename(tmp_path / "e")
    assert TarDataset(tmp_path / "e").digest == digest
    assert len(list((tmp_path / "e").glob("partialfc-index-*"))) == 1


def test_two_sets_in_one_folder_have_an_index_each(tmp_path: Path) -> None:
    write_shards(tmp_path / "d", [[0], [1]], "train")
    write_shards(tmp_path / "d", [[5]], "other")
    assert TarDataset(f"{tmp_path}/d/train-{{000..001}}.tar").num_classes == 2
    assert TarDataset(f"{tmp_path}/d/other-000.tar").num_classes == 6
    assert TarDataset(tmp_path / "d").labels.tolist() == [5, 0, 1]


def test_classes_of_numbers_are_called_by_them_and_counted(tmp_path: Path) -> None:
    data = TarDataset(write_shards(tmp_path / "d", [[0, 3], ["003", 3]]))
    assert (data.num_classes, data.num_samples, data.labels.tolist()) == (4, 4, [0, 3, 3, 3])
    assert data.classes == [{"id": i, "name": str(i), "samples": n} for i, n in enumerate([1, 0, 0, 3])]


def test_classes_of_names_get_ids_in_the_order_of_the_names(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "d", [["walrus", "auk"], ["é t é", "walrus"]])
    data = TarDataset(paths)
    assert data.labels.tolist() == [1, 0, 2, 1]
    assert list(class_names(data.class_table)) == ["auk", "walrus", "é t é"]
    assert [entry["samples"] for entry in data.classes] == [1, 2, 1]
    for _ in range(2):
        assert TarDataset(paths[::-1]).labels.tolist() == [2, 1, 1, 0], "whatever the order of the shards"


@pytest.mark.parametrize("labels", [[[0, "one"]], [["one", 0]], [[0], ["one"]], [["one"], [0]]])
def test_ids_and_names_in_one_set_are_refused(tmp_path: Path, labels: list[list[Any]]) -> None:
    with pytest.raises(InvalidData, match="class ids in all shards, or names in all; `partialfc data convert`"):
        TarDataset(write_shards(tmp_path / "d", labels))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "neither a class id"),
        (b"a\0b", "neither a class id"),
        (b"x" * 300, "neither a class id"),
        (b"x" * 3000, "3,000 bytes"),
        (b"9" * 12, "no class ids"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, label: bytes, message: str) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.cls", label)])
    with pytest.raises(InvalidData, match=message):
        TarDataset(path)


@pytest.mark.parametrize(
    "members",
    [["a.jpg"], ["a.cls"], ["a.jpg", "a.png", "a.cls"], ["a.jpg", "b.cls"], ["a.seg.png", "a.cls"], ["a.1.jpg"]],
)
def test_an_incomplete_sample_is_refused_with_advice(tmp_path: Path, members: list[str]) -> None:
    with pytest.raises(InvalidData, match=r"a\.tar: sample 'a' needs one image .*partialfc data convert"):
        TarDataset(write_tar(tmp_path / "a.tar", [(name, b"1") for name in members]))


def test_what_is_no_set_is_explained(tmp_path: Path) -> None:
    write_shards(tmp_path / "d", [[0]])
    whole = write_samples(tmp_path / "whole", [0, 1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    cases: list[tuple[DataPath, str]] = [
        (tmp_path / "none", r"index\.json is missing"),
        (tmp_path / "empty", r"index\.json is missing"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "none.tar", "shard none.tar is missing"),
        (f"{tmp_path}/d/train-{{000..001}}.tar", r"shard train-001\.tar is missing"),
        ([], "no shards"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("x" * 5000 + ".tar", "cannot be read: File name too long"),
        ("a\0b.tar", "cannot be read: .*embedded null"),  # Python's own words, which differ by version
        ([whole], "a data set folder of its own"),
        ([tmp_path / "d", tmp_path / "d" / "train-000.tar"], "listed twice"),
        ([tmp_path / "empty"], "no shards"),
        (write_tar(tmp_path / "bare.tar", []), r"bare\.tar: no samples; expected images with a \.cls"),
    ]
    for source, message in cases:
        with pytest.raises(DataError, match=message):
            TarDataset(source)
    with pytest.raises(ConfigError, match="only local files"):
        list_shards("https://example.org/{0..3}.tar")


def test_an_unfinished_folder_is_no_plain_set(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "d", [0, 1])
    (folder / "index.json").unlink()
    with pytest.raises(InvalidData, match=r"index\.json is missing"):
        TarDataset(folder)
    (folder / "classes.jsonl").rename(folder / ".unfinished")
    with pytest.raises(InvalidData, match=r"index\.json is missing"):
        TarDataset(folder)


def test_a_replaced_shard_is_indexed_again(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "d", [[0, 1], [2]])
    before = TarDataset(paths)
    write_tar(paths[1], sample_members([3, 3], "new"))
    after = TarDataset(paths)
    assert (after.num_classes, after.labels.tolist()) == (4, [0, 1, 3, 3])
    assert after.digest != before.digest


def test_a_missing_class_table_is_made_again(tmp_path: Path) -> None:
    data = TarDataset(write_shards(tmp_path / "d", [[0, 1]]))
    data.class_table.unlink()
    assert TarDataset(tmp_path / "d").classes == data.classes


def test_what_stands_for_index_json_has_its_fields(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    data = TarDataset(write_shards(folder, [[0, 1], [2]]))
    (folder / "index.json").write_text(json.dumps(data.index))
    edit_json(folder / "index.json", lambda index: index)
    again = TarDataset(folder)
    assert (again.labels.tolist(), again.num_classes) == ([0, 1, 2], 3)
