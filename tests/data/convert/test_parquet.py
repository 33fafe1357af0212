"""Parquet files as a source: files, folders and Hugging Face's dataset folders."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partialfc.data.convert import parquet, parquet_file
from partialfc.data.convert.fields import Fields
from partialfc.data.convert.parquet import Parquet
from partialfc.data.convert.source import Record, Skipped, Unreadable
from partialfc.errors import DataError, DataUnavailable, InvalidData
from tests.harness.data_sets import png
from tests.harness.parquet_files import class_label, image_struct, write_encrypted, write_table


def listed(source: Parquet) -> list[Record | Skipped]:
    source.fingerprint()
    return [each for part in source.parts() for each in source.list_part(part)]


def records(source: Parquet) -> list[Record]:
    return [each for each in listed(source) if isinstance(each, Record)]


def images(source: Parquet, chosen: list[Record]) -> list[bytes | str]:
    """Images, or why there are none, as another process reads them."""
    bare = [Record(record.key, "", record.path, record.file, record.offset, record.size) for record in chosen]
    found = pickle.loads(pickle.dumps(source)).read(bare)
    return [image.reason if isinstance(image, Unreadable) else image for image in found]


def identities(source: Parquet) -> list[str]:
    return [record.identity for record in records(source)]


def one(folder: Path, columns: dict[str, Any], **options: Any) -> Parquet:
    return Parquet(write_table(folder / "set.parquet", columns, **options))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset folder of two splits; the names of the classes are in the metadata."""
    for split, first in (("train", 0), ("test", 100)):
        for piece in range(2):
            numbers = range(first + 10 * piece, first + 10 * piece + 10)
            write_table(
                tmp_path / "data" / f"{split}-{piece:05d}-of-00002.parquet",
                {"image": image_struct([(png(i), f"{i}.png") for i in numbers]), "label": [i % 3 for i in numbers]},
                class_label("label", ["ant", "bee", "cat"]),
                row_group_size=4,
            )
    (tmp_path / "README.md").write_text("# A set")
    return tmp_path


def test_a_dataset_folder_of_hugging_face_gives_its_training_images(dataset: Path) -> None:
    source = Parquet(dataset)
    found = listed(source)
    assert [each for each in found if isinstance(each, Skipped)] == [
        Skipped("file of the split test; --split takes another one")
    ] * 2
    found = records(source)
    assert [record.identity for record in found] == [["ant", "bee", "cat"][i % 3] for i in range(20)]
    assert [record.key for record in found[9:11]] == [
        "data/train-00000-of-00002/000000009",
        "data/train-00001-of-00002/000000000",
    ]
    assert images(source, found) == [png(i) for i in range(20)]
    assert next(iter(records(Parquet(dataset, split="test")))).key == "data/test-00000-of-00002/000000000"


def test_blocks_are_read_in_any_order_and_rows_of_a_block_too(dataset: Path) -> None:
    source = Parquet(dataset)
    found = dict(enumerate(records(source)))
    blocks = sorted({(record.file, record.offset) for record in found.values()})
    rng = random.Random(3)
    rng.shuffle(blocks)
    order = []
    for block in blocks:
        inside = [i for i, record in found.items() if (record.file, record.offset) == block]
        order += rng.sample(inside, rng.randrange(1, len(inside) + 1))
    assert images(source, [found[i] for i in order]) == [png(i) for i in order]


def test_a_row_group_is_read_once_however_many_batches_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_file, "_BATCH_BYTES", 20_000)
    contents = [random.Random(i).randbytes(1000) for i in range(200)]
    source = one(tmp_path, {"image": image_struct([(data, None) for data in contents]), "label": ["a"] * 200})
    found, opened = records(source), list[Path]()
    open_table = parquet.open_table
    monkeypatch.setattr(parquet, "open_table", lambda path, fields: opened.append(path) or open_table(path, fields))
    assert list(source.read(found[::3])) == contents[::3]
    assert opened == [source.path]
    assert list(source.read(found[1::-1])) == contents[1::-1]


def test_images_may_be_binary_and_labels_texts_numbers_or_categories(tmp_path: Path) -> None:
    plain = pa.array([png(1), png(2)], pa.large_binary())
    for label in (["x", "y"], [1, -2], pa.array(["x", "y"]).dictionary_encode(), pa.array([7, 8], pa.uint64())):
        source = one(tmp_path, {"img": plain, "class": label})
        values = label.to_pylist() if isinstance(label, pa.Array) else label
        assert identities(source) == [str(value) for value in values]
        assert images(source, records(source)) == [png(1), png(2)]


def test_a_table_of_paths_reads_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png(1))
    paths = pa.array(["a/1.png", "a/2.png", None, "a/1.png"]).dictionary_encode()
    source = one(tmp_path, {"file": paths, "identity": ["x", "y", "z", None]})
    found = listed(source)
    assert found[2:] == [Skipped("row without an image"), Skipped("row without an identity")]
    assert [record.key for record in records(source)] == ["a/1", "a/2"]
    assert (source.in_blocks, Parquet(source.path).in_blocks) == (False, False)
    assert images(source, records(source)) == [png(1), "cannot be read: No such file or directory"]
    with pytest.raises(InvalidData, match=r"set\.parquet: row 1: '\.\./b\.png' leads out of"):
        listed(one(tmp_path, {"file": ["a/1.png", "../b.png"], "identity": ["x", "y"]}))


def test_an_image_without_bytes_is_read_by_its_path_and_none_leads_out(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    source = one(
        tmp_path,
        {"image": image_struct([(None, "1.png"), None, (None, None), (None, "/etc/passwd")]), "label": [1] * 4},
    )
    assert images(source, records(source))[:3] == [png(1), "is null", "is null"]
    assert str(images(source, records(source))[3]).startswith("its path '/etc/passwd' leads out of ")
    other = Parquet(tmp_path / "set.parquet", images=tmp_path / "elsewhere")
    with pytest.raises(InvalidData, match="elsewhere, the folder of the images, does not exist"):
        other.fingerprint()
    (tmp_path / "elsewhere").mkdir()
    assert images(other, records(other))[0] == "cannot be read: No such file or directory"


def test_unlabelled_rows_are_counted_and_unknown_labels_refused(tmp_path: Path) -> None:
    columns = {"image": image_struct([(png(1), None)] * 3), "label": [1, -1, None]}
    names = class_label("label", ["ant", "bee"])
    assert [
        each if isinstance(each, Skipped) else each.identity for each in listed(one(tmp_path, columns, metadata=names))
    ] == [
        "bee",
        Skipped("row without an identity"),
        Skipped("row without an identity"),
    ]
    with pytest.raises(InvalidData, match=r"row 0: label 1 is none of the 1 classes that the file names"):
        listed(one(tmp_path, columns, metadata=class_label("label", ["ant"])))
    for damaged in (b"{", b"[]", b"[" * 100_000):
        assert identities(one(tmp_path, columns, metadata={b"huggingface": damaged})) == ["1", "-1"]


@pytest.mark.parametrize("names", [["ant", "ant"], ["ant", 1], ["", "bee"], {"0": "ant"}])
def test_names_that_cannot_tell_classes_apart_are_refused(tmp_path: Path, names: Any) -> None:
    source = one(
        tmp_path, {"image": image_struct([(png(1), None)]), "label": [0]}, metadata=class_label("label", names)
    )
    with pytest.raises(InvalidData, match=r"file names for column 'label' must be different texts, got "):
        listed(source)


def test_a_column_gives_the_keys(tmp_path: Path) -> None:
    columns = {"image": image_struct([(png(1), None)] * 2), "label": ["a", "b"], "id": [5, 6]}
    source = Parquet(one(tmp_path, columns).path, fields=Fields(key="id"))
    assert [record.key for record in records(source)] == ["5", "6"]


def test_columns_are_chosen_by_options_and_never_guessed(tmp_path: Path) -> None:
    both = image_struct([(png(1), None)])
    source = one(tmp_path, {"image": both, "mask": both, "label": ["a"], "name": ["b"]})
    with pytest.raises(InvalidData, match=r"several columns could be the images, .*'image' .*'mask' .*--image-field"):
        source.fingerprint()
    with pytest.raises(InvalidData, match=r"several could be meant, there are 'label', 'name'; .*--label-field"):
        Parquet(source.path, fields=Fields(image="mask")).fingerprint()
    assert identities(Parquet(source.path, fields=Fields(image="mask", label="name"))) == ["b"]
    with pytest.raises(InvalidData, match=r"column 'label' must hold images .* of type int64"):
        one(
            tmp_path,
            {"label": [1]},
        ).__class__(source.path, fields=Fields(image="label")).fingerprint()
    with pytest.raises(InvalidData, match=r"no column of images, there are 'text' \(string\), 'label' \(int64\)"):
        one(tmp_path, {"text": ["a"], "label": [1]}).fingerprint()
    with pytest.raises(InvalidData, match=r"row 0: an identity or key must be a text or a whole number, got 0\.5"):
        listed(one(tmp_path, {"image": both, "label": [0.5]}))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.parquet", "val.parquet"], ["train.parquet"]),
        (["train/0000.parquet", "test/0000.parquet"], ["train/0000.parquet"]),
        (["full-00000-of-00001-ab12.parquet"], ["full-00000-of-00001-ab12.parquet"]),
        (["a.parquet", "b/latest.PARQUET", ".hidden.parquet", ".git/x.parquet"], ["a.parquet", "b/latest.PARQUET"]),
        (["test.parquet"], ["test.parquet"]),
    ],
)
def test_the_training_split_or_the_only_one_is_taken(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    for name in names:
        write_table(tmp_path / name, {"image": image_struct([(png(1), None)]), "label": [name]})
    assert identities(Parquet(tmp_path)) == expected


def test_splits_without_a_training_split_must_be_chosen(tmp_path: Path) -> None:
    for name in ("validation.parquet", "test.parquet", "more.parquet"):
        write_table(tmp_path / name, {"image": image_struct([(png(1), None)]), "label": [name]})
    with pytest.raises(
        InvalidData, match=r"expected files of the split train, found files without .*, test, validation"
    ):
        Parquet(tmp_path).fingerprint()
    assert identities(Parquet(tmp_path, split="validation")) == ["validation.parquet"]


def test_what_is_no_parquet_is_refused_with_the_file(tmp_path: Path) -> None:
    good = one(tmp_path, {"image": image_struct([(png(1), None)] * 9), "label": ["a"] * 9}).path.read_bytes()
    path = tmp_path / "bad.parquet"
    for content in (b"", b"PAR1", b"text" * 100, good[:-30], good[:-4] + b"PARE", good[40:]):
        path.write_bytes(content)
        with pytest.raises(InvalidData, match=r"bad\.parquet: damaged, encrypted, or not Parquet: ") as refused:
            listed(Parquet(path))
        assert len(str(refused.value).splitlines()) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidData, match=r"empty holds no \.parquet files"):
        Parquet(tmp_path / "empty").fingerprint()
    os.mkfifo(tmp_path / "fifo.parquet")
    with pytest.raises(DataUnavailable, match=r"fifo\.parquet cannot be read: not a regular file"):
        Parquet(tmp_path / "fifo.parquet").fingerprint()


@pytest.mark.parametrize("plaintext_footer", [False, True])
def test_an_encrypted_file_is_refused_in_one_line(tmp_path: Path, plaintext_footer: bool) -> None:
    path = write_encrypted(tmp_path / "set.parquet", {"image": pa.array([b"x"]), "label": [1]}, plaintext_footer)
    source = Parquet(path)
    with pytest.raises(InvalidData, match=r"set\.parquet: damaged, encrypted, or not Parquet: ") as refused:
        images(source, records(source))
    assert len(str(refused.value).splitlines()) == 1


def test_a_source_that_changes_has_another_fingerprint(dataset: Path) -> None:
    before = Parquet(dataset).fingerprint()
    assert before == pickle.loads(pickle.dumps(Parquet(dataset))).fingerprint()
    assert before != Parquet(dataset, split="test").fingerprint()
    os.utime(dataset / "data" / "train-00001-of-00002.parquet", ns=(1, 1))
    assert before != Parquet(dataset).fingerprint()


def test_paths_are_matched_by_their_names_and_folders_by_what_they_hold(dataset: Path, tmp_path: Path) -> None:
    assert Parquet.matches(dataset)
    assert Parquet.matches(Path("x.parquet"))
    assert not Parquet.matches(Path("x.csv"))
    (tmp_path / "other").mkdir()
    assert not Parquet.matches(tmp_path / "other")


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), flips=st.integers(1, 4), cut=st.booleans())
def test_a_damaged_file_is_refused_or_gives_nothing_but_images_of_the_original(
    tmp_path: Path, seed: int, flips: int, cut: bool
) -> None:
    contents = [random.Random(i).randbytes(50) for i in range(20)]
    columns = {"image": image_struct([(data, None) for data in contents]), "label": list(range(20))}
    path = write_table(tmp_path / "good.parquet", columns, row_group_size=7, write_page_checksum=True)
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(flips):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (tmp_path / "bad.parquet").write_bytes(data[: rng.randrange(len(data))] if cut else data)
    source = Parquet(tmp_path / "bad.parquet")
    message = ""
    try:
        found = records(source)
        assert set(images(source, found)) <= {*contents, "is null"}
    except DataError as error:
        message = str(error)
    assert len(message.splitlines()) < 2
    assert str(tmp_path) in message or not message
