"""Tars as WebDataset's users write them; webdataset's own reader says what is in them."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partialfc.data.convert.fields import Fields
from partialfc.data.convert.source import Record, Skipped, Unreadable, sample_key
from partialfc.data.convert.webdataset_tars import WebDatasetTars
from partialfc.errors import DataError, DataUnavailable, InvalidData
from tests.harness.tars import write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Members = list[tuple[str, bytes]]


def listed(source: WebDatasetTars) -> list[Record | Skipped]:
    json.dumps(source.fingerprint())
    return [each for part in source.parts() for each in source.list_part(part)]


def content(source: WebDatasetTars) -> list[tuple[str, str, bytes | str]]:
    """Key, identity and image, read backwards by a copy, as another process would."""
    found = [each for each in listed(source) if isinstance(each, Record)]
    bare = [Record(record.key, "", "", record.file, record.offset, record.size) for record in found[::-1]]
    images = list(pickle.loads(pickle.dumps(source)).read(bare))[::-1]
    texts = [image.reason if isinstance(image, Unreadable) else image for image in images]
    return [(record.key, record.identity, text) for record, text in zip(found, texts, strict=True)]


def skipped(source: WebDatasetTars) -> list[str]:
    return [each.reason for each in listed(source) if isinstance(each, Skipped)]


def one(folder: Path, members: Members, **fields: str) -> WebDatasetTars:
    return WebDatasetTars(write_tar(folder / "set.tar", members, tarfile.PAX_FORMAT), Fields(**fields))


def of_webdataset(paths: list[Path]) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))


@pytest.mark.parametrize("format", FORMATS)
def test_keys_images_and_labels_are_those_of_webdataset(tmp_path: Path, format: str) -> None:
    members = []
    for i, extension in enumerate(["jpg", "JPG", "jpeg", "png", "webp", "Gif", "bmp", "tiff"]):
        key = ["0001", "a/b/0001", "./0002", "ü\u3042/x", "with.dots/y z", "a-" * 40, "c/" + "d" * 90, "e%"][i]
        members += [(f"{key}.{extension}", bytes([i]) * (500 * i + 1)), (f"{key}.CLS", f"{i + 3}\n".encode())]
        members += [(f"{key}.json", b"{}"), ("README", b"text"), (f"{key}.txt", b"a caption")]
    path = write_tar(tmp_path / "t.tar", members, FORMATS[format])
    expected = []
    for sample in of_webdataset([path]):
        (image,) = [value for name, value in sample.items() if name not in ("cls", "json", "txt") and name[0] != "_"]
        expected.append((sample["__key__"], int(sample["cls"]), image))
    found = content(WebDatasetTars(path))
    assert [(key, int(label), image) for key, label, image in found] == [
        (sample_key(key.removeprefix("./")), label, image) for key, label, image in expected
    ]
    assert len(found) == 8


def test_what_webdatasets_own_writer_writes_is_read(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(8):
            writer.write({"__key__": f"k{i}", "jpg": bytes([i]) * 9, "cls": i % 3})
    expected = [(f"k{i}", str(i % 3), bytes([i]) * 9) for i in range(8)]
    pattern = f"{tmp_path}/s-{{000..002}}.tar"
    for source in (tmp_path, pattern, f"{tmp_path}/s-000.tar::{tmp_path}/s-{{001,002}}.tar"):
        assert content(WebDatasetTars(source)) == expected
        assert WebDatasetTars.matches(source)
    assert [(s["__key__"], s["cls"].decode(), s["jpg"]) for s in of_webdataset(sorted(tmp_path.iterdir()))] == expected


def test_labels_may_be_texts_and_the_class_goes_before_the_caption(tmp_path: Path) -> None:
    source = one(tmp_path, [("a.jpg", b"1"), ("a.txt", " Łukasz B.\n".encode()), ("b.txt", b"Ann"), ("b.jpg", b"2")])
    assert content(source) == [("a", "Łukasz B.", b"1"), ("b", "Ann", b"2")]
    members = [("a.txt", b"caption"), ("a.jpg", b"1"), ("b.jpg", b"2"), ("b.txt", b"caption"), ("a.cls", b"7")]
    assert content(one(tmp_path, members)) == [("a", "7", b"1")]
    assert skipped(one(tmp_path, members)) == ["image without .cls"]
    assert [label for _, label, _ in content(one(tmp_path, members, label="TXT"))] == ["caption", "caption"]


def test_a_field_of_the_json_may_be_the_label(tmp_path: Path) -> None:
    values: list[Any] = ["Ann", 12, None, ""]
    members = []
    for i, value in enumerate(values):
        members += [
            (f"{i}.jpg", b"x"),
            (f"{i}.json", json.dumps({"Who": value, "cls": 5}).encode()),
            (f"{i}.cls", b"9"),
        ]
    members += [("4.jpg", b"x"), ("4.json", b"{}")]
    source = one(tmp_path, members, label="Who")
    assert [(key, label) for key, label, _ in content(source)] == [("0", "Ann"), ("1", "12")]
    assert skipped(source) == ["sample without an identity"] * 3
    for bad, words in [(b"{", "Expecting"), (b"[]", "expected a JSON object"), (b'{"Who": 1.5}', "got 1.5")]:
        with pytest.raises(InvalidData, match=r"set\.tar: 'a\.json' at byte \d+: .*" + words):
            listed(one(tmp_path, [("a.jpg", b"x"), ("a.json", bad)], label="Who"))


def test_members_of_a_sample_need_not_follow_each_other(tmp_path: Path) -> None:
    members = [(f"{i}.{extension}", f"{i}".encode()) for i in range(30) for extension in ("jpg", "cls", "json")]
    expected = sorted((str(i), str(i), str(i).encode()) for i in range(30))
    for seed in range(3):
        random.Random(seed).shuffle(members)
        assert sorted(content(one(tmp_path, members))) == expected
    assert sorted(content(one(tmp_path, sorted(members, key=lambda each: each[0].split(".")[1])))) == expected


def test_samples_take_no_memory_once_they_are_complete(tmp_path: Path) -> None:
    members = [(f"{i:090d}.{kind}", b"1") for i in range(2000) for kind in ("jpg", "cls")]
    source = WebDatasetTars(write_tar(tmp_path / "set.tar", members))
    source.fingerprint()
    tracemalloc.start()
    try:
        assert sum(1 for _ in source.list_part(0)) == 2000
        assert tracemalloc.get_traced_memory()[1] < 600_000
    finally:
        tracemalloc.stop()


def test_incomplete_samples_are_counted(tmp_path: Path) -> None:
    source = one(tmp_path, [("a.jpg", b"1"), ("b.cls", b"2"), ("c.jpg", b"3"), ("c.cls", b" \n"), (".d.jpg", b"4")])
    assert sorted(skipped(source)) == [
        "image without .cls",
        "member of a tar that belongs to no sample",
        "sample without an identity",
        "sample without an image",
    ]


def test_a_dotted_name_may_hold_several_samples_of_one_key(tmp_path: Path) -> None:
    members = [
        ("a.1.jpg", b"1"),
        ("a.1.cls", b"5"),
        ("a.2.jpg", b"2"),
        ("a.2.cls", b"6"),
        ("b.v2.jpg", b"3"),
        ("b.cls", b"7"),
    ]
    assert content(one(tmp_path, members)) == [("a%2E1", "5", b"1"), ("a%2E2", "6", b"2"), ("b", "7", b"3")]
    assert [sample["__key__"] for sample in of_webdataset([tmp_path / "set.tar"])] == ["a", "b"]


def test_of_several_images_the_one_of_the_labels_name_or_a_chosen_one_is_taken(tmp_path: Path) -> None:
    masked = [("a.jpg", b"1"), ("a.seg.png", b"2"), ("a.cls", b"3")]
    assert content(one(tmp_path, masked)) == [("a", "3", b"1")]
    assert content(one(tmp_path, masked, image="Seg.png")) == [("a", "3", b"2")]
    for members in (
        [("a.left.jpg", b"1"), ("a.right.jpg", b"2"), ("a.cls", b"3")],
        [("a.jpg", b"1"), ("a.png", b"2"), ("a.cls", b"3")],
    ):
        with pytest.raises(InvalidData, match=r"set\.tar: sample 'a' has \.\w.*, \.cls: which is .* --image-field"):
            listed(one(tmp_path, members))
    assert content(
        one(tmp_path, [("a.left.jpg", b"1"), ("a.right.jpg", b"2"), ("a.cls", b"3")], image="right.jpg")
    ) == [("a", "3", b"2")]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.jpg", b"1"), ("a.json", b"{}")], r"no labels: expected \.cls or \.txt, found \.jpg, \.json; see --label"),
        ([("a.jpg", b"1"), ("a.jpg", b"1"), ("a.cls", b"1")], r"sample 'a' has two members \.jpg, one at byte 1536"),
        ([("a.jpg", b"1"), ("a.cls", b"1" * 2000)], r"'a\.cls' at byte \d+ has 2,000 bytes, a label up to 1,024"),
        ([("a.jpg", b"1"), ("a.cls", b"\xff")], r"'a\.cls' at byte \d+: .*invalid start byte"),
        ([("../a.jpg", b"1"), ("a.cls", b"1")], "leads out of the archive"),
        ([("a.cls", b"1"), ("/a.jpg", b"1")], "leads out of the archive"),
    ],
)
def test_what_is_wrong_is_refused_with_the_tar(tmp_path: Path, members: Members, words: str) -> None:
    with pytest.raises(InvalidData, match=words) as refused:
        listed(WebDatasetTars(write_tar(tmp_path / "set.tar", members, tarfile.USTAR_FORMAT)))
    assert str(refused.value).startswith(f"{tmp_path}/set.tar")
    assert len(str(refused.value).splitlines()) == 1


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-0.tar", [("a.jpg", b"1"), ("a.cls", b"1")], tarfile.USTAR_FORMAT)
    with pytest.raises(InvalidData, match=r"s-1\.tar does not exist"):
        WebDatasetTars(f"{tmp_path}/s-{{0..1}}.tar").fingerprint()
    os.mkfifo(tmp_path / "s-1.tar")
    with pytest.raises(DataUnavailable, match=r"s-1\.tar cannot be read: not a regular file"):
        listed(WebDatasetTars(tmp_path))


def test_a_tar_that_shrinks_meanwhile_is_noticed(tmp_path: Path) -> None:
    source = one(tmp_path, [("a.jpg", b"1" * 5000), ("a.cls", b"1")])
    found = [each for each in listed(source) if isinstance(each, Record)]
    before = source.fingerprint()
    os.truncate(tmp_path / "set.tar", 2000)
    assert source.fingerprint() != before
    with pytest.raises(InvalidData, match=r"set\.tar: ends before sample 'a'"):
        list(source.read(found))


@pytest.mark.parametrize("label", [None, "cls"])
def test_labels_may_lie_behind_more_images_than_are_looked_at(tmp_path: Path, label: str | None) -> None:
    images = [(f"k{i}.jpg", b"i") for i in range(1200)]
    write_tar(tmp_path / "set.tar", [*images, *((f"k{i}.cls", b"1") for i in range(1200))], tarfile.USTAR_FORMAT)
    assert len(listed(WebDatasetTars(tmp_path, Fields(label=label)))) == 1200


def test_many_tars_are_read_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))
    for i in range(5):
        write_tar(tmp_path / f"{i}.tar", [(f"k{i}.jpg", bytes([i])), (f"k{i}.cls", b"1")], tarfile.USTAR_FORMAT)
    source = WebDatasetTars(tmp_path)
    found = [each for each in listed(source) if isinstance(each, Record)] * 3
    random.Random(1).shuffle(found)
    before = len(os.listdir("/proc/self/fd"))
    reading = source.read(found)
    for record in found:
        assert next(reading) == bytes([record.file])
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    reading.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_paths_are_matched_by_their_names(tmp_path: Path) -> None:
    assert not WebDatasetTars.matches(tmp_path)
    assert not WebDatasetTars.matches("set.tar.gz")
    one(tmp_path, [])
    assert WebDatasetTars.matches(tmp_path)
    assert WebDatasetTars.matches(tmp_path / "set.tar")


NAMES = st.text("ab.\u3042 ", min_size=1, max_size=4)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(NAMES, unique=True, max_size=8), seed=st.integers(0, 1 << 30), format=st.sampled_from(list(FORMATS))
)
def test_shuffled_members_give_what_webdataset_reads_from_sorted_ones(
    tmp_path: Path, names: list[str], seed: int, format: str
) -> None:
    members: Members = [("x.cls", b"0"), ("x.jpg", b"0")]
    for i, name in enumerate(names):
        members += [(f"folder/{name}.jpg", bytes([i])), (f"folder/{name}.cls", str(i).encode())]
    keys = [name.split("/")[-1].split(".")[0] for name, _ in members]
    members = [each for each, key in zip(members, keys, strict=True) if keys.count(key) == 2 and key]  # one image a key
    path = write_tar(tmp_path / "sorted.tar", sorted(members), FORMATS[format])
    expected = []
    for sample in of_webdataset([path]):
        by_type = {name.rpartition(".")[2]: value for name, value in sample.items() if name[0] != "_"}
        expected.append((sample_key(sample["__key__"]), by_type["cls"].decode(), by_type["jpg"]))
    random.Random(seed).shuffle(members)
    found = content(WebDatasetTars(write_tar(tmp_path / "shuffled.tar", members, FORMATS[format])))
    assert sorted(found) == sorted(expected)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), flips=st.integers(1, 4), cut=st.booleans())
def test_a_damaged_tar_is_refused_in_one_line_or_gives_parts_of_it(
    tmp_path: Path, seed: int, flips: int, cut: bool
) -> None:
    members = [(f"{i}.{kind}", str(i).encode() * 99) for i in range(4) for kind in ("jpg", "cls")]
    data = bytearray(write_tar(tmp_path / "good.tar", members, tarfile.PAX_FORMAT).read_bytes())
    rng = random.Random(seed)
    for _ in range(flips):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (tmp_path / "bad.tar").write_bytes(data[: rng.randrange(len(data))] if cut else data)
    message = ""
    try:
        assert all(image in bytes(data) for _, _, image in content(WebDatasetTars(tmp_path / "bad.tar")))
    except DataError as error:
        message = str(error)
    assert message.startswith(f"{tmp_path}/bad.tar") or not message
    assert len(message.splitlines()) < 2
