"""RecordIO: genuine files read as MXNet reads them, and damaged ones refused by file and byte."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.data.convert import recordio
from partialfc.data.convert.recordio import RecordIO
from partialfc.data.convert.source import Record, Skipped
from partialfc.errors import DataError, InvalidData
from tests.harness.converting import FIXTURES, picture, run, samples
from tests.harness.recordio_files import MAGIC, content, part, record, write_rec


def expected(name: str) -> list[dict[str, Any]]:
    images: list[dict[str, Any]] = json.loads((FIXTURES / name / "expected.json").read_text())["images"]
    return images


def read_all(path: Path) -> list[tuple[str, str, bytes]]:
    """Return key, identity and image of each record."""
    source = RecordIO.open(path)
    records = [each for part in source.parts() for each in source.list_part(part) if isinstance(each, Record)]
    images = list(source.read(records))
    assert all(isinstance(image, bytes) for image in images)
    return [(each.key, each.identity, image) for each, image in zip(records, images, strict=True)]  # type: ignore[misc]


def skipped(path: Path) -> list[str]:
    source = RecordIO.open(path)
    found = (each for part in source.parts() for each in source.list_part(part))
    return [each.reason for each in found if isinstance(each, Skipped)]


@pytest.mark.parametrize("name", ["faces_a", "faces_b"])
def test_every_digest_and_label_of_a_genuine_set_arrives_in_the_data_set(tmp_path: Path, name: str) -> None:
    run(FIXTURES / name, tmp_path / "out", samples_per_shard=25)
    wanted = {str(image["key"]): (str(image["label"]), image["sha256"]) for image in expected(name)}
    assert samples(tmp_path / "out") == wanted
    table = [json.loads(line) for line in (tmp_path / "out" / "classes.jsonl").read_text().splitlines()]
    assert [entry["name"] for entry in table] == [str(entry["id"]) for entry in table], "labels keep their numbers"


@pytest.mark.parametrize("name", ["faces_a", "faces_b"])
def test_images_come_in_the_order_of_the_idx(name: str) -> None:
    wanted = [(str(image["key"]), str(image["label"]), image["sha256"]) for image in expected(name)]
    assert [
        (key, label, hashlib.sha256(image).hexdigest()) for key, label, image in read_all(FIXTURES / name)
    ] == wanted


@pytest.mark.parametrize("name", ["faces_a", "faces_b"])
def test_without_idx_and_property_the_records_are_the_same(tmp_path: Path, name: str) -> None:
    shutil.copy(FIXTURES / name / "train.rec", tmp_path / "any.rec")
    found = read_all(tmp_path / "any.rec")
    assert sorted((label, image) for _, label, image in found) == sorted(
        (label, image) for _, label, image in read_all(FIXTURES / name)
    )
    assert [int(key) for key, _, _ in found] == sorted(int(key) for key, _, _ in found)


def test_an_idx_is_read_in_ranges_without_losing_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_all(FIXTURES / "faces_b")
    for size in (1, 7, 8, 64, 100):
        monkeypatch.setattr(recordio, "_PART_BYTES", size)
        assert read_all(FIXTURES / "faces_b") == whole
        assert skipped(FIXTURES / "faces_b") == []


def test_the_index_that_insightface_keeps_among_the_records_is_left_out_and_counted() -> None:
    source = RecordIO.open(FIXTURES / "faces_a")
    assert (source.num_records(), source.num_identities()) == (60, 12)
    assert len(skipped(FIXTURES / "faces_a")) == 1 + 12
    assert RecordIO.open(FIXTURES / "faces_b").num_records() is None


def test_a_first_image_with_a_vector_label_is_no_header(tmp_path: Path) -> None:
    folder = write_rec(tmp_path, [record(b"first", [3.0, 1.0]), record(b"second", 4.0)])
    assert [(label, image) for _, label, image in read_all(folder)] == [("3", b"first"), ("4", b"second")]
    assert RecordIO.open(folder).num_records() is None


def test_an_image_of_no_bytes_is_listed_so_that_it_counts_as_bad(tmp_path: Path) -> None:
    folder = write_rec(tmp_path / "in", [record(b"", 3.0), *(record(picture(i), 1.0) for i in range(3))])
    assert run(folder, tmp_path / "out", max_bad=0.5).num_bad == 1


@settings(max_examples=50)
@given(st.lists(st.lists(st.sampled_from([MAGIC, b"x", b"four", b"\n\0"]), max_size=12).map(b"".join), max_size=4))
def test_magic_numbers_in_an_image_come_back_wherever_they_stand(
    tmp_path_factory: pytest.TempPathFactory, images: list[bytes]
) -> None:
    images = [b"\xff" + image for image in [*images, MAGIC * 3]]
    folder = tmp_path_factory.mktemp("rec")
    write_rec(folder, [record(image, [float(i), 0.0] if i % 2 else float(i)) for i, image in enumerate(images)])
    assert read_all(folder) == [(str(i), str(i), image) for i, image in enumerate(images)]
    assert read_all(folder / "train.rec")[0][2] == images[0]


@pytest.mark.parametrize("label", [0.5, -1.0, float("nan"), float("inf"), 2.0**24])
def test_a_label_that_is_no_class_is_refused(tmp_path: Path, label: float) -> None:
    folder = write_rec(tmp_path, [record(b"image", 7.0), record(b"image", label)])
    with pytest.raises(InvalidData, match=r"train\.rec: byte 40: label .* is not a class"):
        read_all(folder)


def test_the_largest_exact_label_is_a_class(tmp_path: Path) -> None:
    assert read_all(write_rec(tmp_path, [record(b"image", 2.0**24 - 1)]))[0][1] == "16777215"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "train.rec is empty"),
        (b"not a record file", "byte 0: expected a record"),
        (MAGIC, "byte 0: no record can begin here"),
        (part(b"short"), "byte 0: expected a header of 24 bytes"),
        (part(content(b"image", 1.0), length=1000), "byte 0: truncated: a part of 1,000 bytes"),
        (part(content(b"image", 1.0), kind=2), "byte 0: expected the first part of a record, got kind 2"),
        (part(content(b"image", 1.0), kind=5), "byte 0: expected the first part of a record, got kind 5"),
        (part(content(b"image!!!", 1.0), kind=1), "byte 40: no record can begin here"),
        (part(content(b"image!!!", 1.0), kind=1) * 2, "byte 40: expected the next part of a record, got kind 1"),
        (part(content(b"image", 1.0, flag=2**32 - 1)), "byte 0: the header tells of 4,294,967,295 labels"),
        (record(b"image...", 1.0) + b"\n", "byte 40: no record can begin here"),
    ],
)
def test_damage_is_named_by_file_and_byte(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "train.rec").write_bytes(data)
    with pytest.raises(InvalidData, match=message):
        run(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "train.idx is empty"),
        ("0\t4\n", r"train\.rec: byte 4: expected a record"),
        ("0\t2\n", "byte 2: no record can begin here"),
        ("0\t999999\n", "byte 999,999: no record can begin here"),
        ("0\t9" + "9" * 30 + "\n", "no record can begin here"),
        ("0 0\n", r"train\.idx: byte 0: expected a key, a tab and a number"),
        ("0\t0\n1\t-4\n", r"train\.idx: byte 4: expected a key"),
        ("0\t0\n\n", r"train\.idx: byte 4: expected a key"),
        ("0\t0\n" + "1" * 1000 + "\t40\n", r"train\.idx: byte 4: expected a key"),
    ],
)
def test_an_idx_that_does_not_fit_is_refused(tmp_path: Path, index: str, message: str) -> None:
    folder = write_rec(tmp_path / "in", [record(b"image...", 1.0)] * 2)
    (folder / "train.idx").write_text(index)
    with pytest.raises(InvalidData, match=message):
        run(folder, tmp_path / "out")


@pytest.mark.parametrize(("keys", "places"), [([0, 2], 1), ([0, 1], 1), ([1, 2], 1), ([2, 1, 0], 4), ([0, 1, 2], 0)])
def test_an_idx_that_leaves_out_records_is_said_to(tmp_path: Path, keys: list[int], places: int) -> None:
    folder = write_rec(tmp_path, [record(b"image...", float(i)) for i in range(3)])
    (folder / "train.idx").write_text("".join(f"{key}\t{40 * key}\n" for key in keys))
    assert len(skipped(folder)) == places
    assert [key for key, _, _ in read_all(folder)] == [str(key) for key in keys]


def test_keys_of_an_idx_may_be_names(tmp_path: Path) -> None:
    folder = write_rec(tmp_path, [record(b"image...", 1.0)] * 2)
    (folder / "train.idx").write_bytes(b"a/b.jpg\t0\r\n\xff\t40\n")
    assert [key for key, _, _ in read_all(folder)] == ["a/b%2Ejpg", "%ED%B3%BF"]


@pytest.mark.parametrize("text", ["", "12", "a,b,c", "1,2,3,4", "-1,112,112", "1" * 5000])
def test_a_property_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_rec(tmp_path / "in", [record(picture(0), 1.0)])
    (folder / "property").write_text(text)
    with pytest.raises(DataError, match="property"):
        run(folder, tmp_path / "out")


def test_counts_that_disagree_with_header_and_property_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record(picture(i), float(i)) for i in range(3)]
    folder = write_rec(tmp_path / "in", [record(b"", [9.0, 11.0]), *records])
    (folder / "property").write_text("5,112,112")
    run(folder, tmp_path / "out")
    said = capsys.readouterr().out
    assert "warning: the source says that it has 8 images, but 3 were found" in said
    assert "warning: the source says that it has 5 identities, but 3 were found" in said
    assert "left out: 1 × record without an image" in said


def test_a_folder_with_several_rec_files_needs_a_train_rec(tmp_path: Path) -> None:
    folder = write_rec(tmp_path, [record(b"image...", 1.0)])
    shutil.copy(folder / "train.rec", folder / "val.rec")
    assert RecordIO.open(folder).records == folder / "train.rec"
    (folder / "train.rec").rename(folder / "other.rec")
    with pytest.raises(InvalidData, match=r"expected a file train\.rec"):
        RecordIO.open(folder)


GENUINE = (FIXTURES / "faces_a" / "train.rec").read_bytes()[:6000]
IMAGES = {image["sha256"] for image in expected("faces_a")}


@settings(max_examples=50)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.integers(0, len(GENUINE)).map(lambda size: GENUINE[:size]),
        st.tuples(st.integers(0, len(GENUINE) - 1), st.integers(1, 255)).map(
            lambda flip: GENUINE[: flip[0]] + bytes([GENUINE[flip[0]] ^ flip[1]]) + GENUINE[flip[0] + 1 :]
        ),
    )
)
def test_any_bytes_are_records_or_an_error_with_their_place(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("rec") / "train.rec"
    path.write_bytes(data)
    tracemalloc.start()
    found, problem = list[tuple[str, str, bytes]](), None
    try:
        found = read_all(path)
    except InvalidData as error:
        problem = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data) + (1 << 20)
    assert problem is None or problem.startswith(f"{path}: byte ")
    # The format has no checksums: a changed byte may be one of an image, but every other image is as it was.
    assert sum(hashlib.sha256(image).hexdigest() not in IMAGES for _, _, image in found) <= 1
