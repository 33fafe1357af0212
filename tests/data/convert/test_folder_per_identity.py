"""A folder per identity: what counts as an image, in which order, and what is left out and said."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from partialfc.data.convert import folders
from partialfc.data.convert.folders import FolderPerIdentity
from partialfc.data.convert.source import Record, Skipped
from partialfc.errors import DataUnavailable, InvalidData
from tests.harness.converting import class_names, content, picture, run, samples, write_folders


def touch(root: Path, *names: str | bytes) -> Path:
    for name in names:
        path = Path(os.fsdecode(os.path.join(os.fsencode(root), os.fsencode(name))))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")
    return root


def listed(root: Path) -> tuple[list[Record], Counter[str]]:
    source = FolderPerIdentity(root)
    found = [each for part in source.parts() for each in source.list_part(part)]
    skipped = Counter(each.reason for each in found if isinstance(each, Skipped))
    return [each for each in found if isinstance(each, Record)], skipped


def test_images_at_any_depth_belong_to_the_first_folder(tmp_path: Path) -> None:
    records, skipped = listed(touch(tmp_path, "b/1.JPG", "a/x/y/z/1.png", "a/2.webp", "a/x/1.TiFf", "c/d/e.jpeg"))
    assert [(each.identity, each.key, each.path) for each in records] == [
        ("a", "a/2", "a/2.webp"),
        ("a", "a/x/1", "a/x/1.TiFf"),
        ("a", "a/x/y/z/1", "a/x/y/z/1.png"),
        ("b", "b/1", "b/1.JPG"),
        ("c", "c/d/e", "c/d/e.jpeg"),
    ]
    assert not skipped


def test_every_kind_of_image_becomes_a_sample(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "a").mkdir(parents=True)
    for i, extension in enumerate(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")):
        kind = {"jpg": "jpeg", "tiff": "tif"}.get(extension, extension)
        (root / "a" / f"{i}.{extension.upper()}").write_bytes(picture(i, kind))
    assert run(root, tmp_path / "out").num_samples == 8


def test_the_order_is_that_of_the_bytes_whatever_the_file_system_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{folder}/{name}.jpg" for folder in ("é", "a", "B", "a b", "a-b") for name in ("2", "10", "ü", "Z")]
    root = touch(tmp_path, *names)
    expected = listed(root)
    real = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with real(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert listed(root) == expected
    identities = [each.identity.encode() for each in expected[0]]
    assert identities == sorted(identities)


def test_what_is_no_image_is_left_out_and_counted(tmp_path: Path) -> None:
    root = touch(tmp_path / "in", "a/1.jpg", "a/notes.txt", "a/jpg", "a/2.jpg.part", "stray.jpg", "notes.txt")
    touch(root, "a/.hidden.jpg", "a/.git/1.jpg", "__MACOSX/a/1.jpg", "a/__MACOSX/1.jpg", "a/Thumbs.db", ".x/1.jpg")
    (root / "empty").mkdir()
    (root / "a" / "link.jpg").symlink_to(root / "a" / "1.jpg")
    (root / "a" / "folder").symlink_to(root)
    (root / "linked").symlink_to(root / "a")
    os.mkfifo(root / "a" / "fifo.jpg")
    records, skipped = listed(root)
    assert [each.key for each in records] == ["a/1"]
    assert skipped == {
        folders._LINK.reason: 3,
        folders._OTHER.reason: 3,
        folders._SPECIAL.reason: 1,
        folders._EMPTY.reason: 1,
        folders._STRAY.reason: 1,
    }


def test_what_is_left_out_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folders(tmp_path / "in", {"a": 2, "b": 2})
    for name in ("a", "b"):
        (root / name / "link.png").symlink_to(root / name / "000.png")
    run(root, tmp_path / "out")
    assert capsys.readouterr().out.count("2 × symbolic link") == 1


def test_files_that_differ_only_by_extension_have_different_keys(tmp_path: Path) -> None:
    names = ["a/1.jpg", "a/1.png", "a/1.png.jpg", "a/1.png.png", "a/1/2.jpg", "a/1.b/2.jpg", "a/1%2Epng.bmp"]
    records, _ = listed(touch(tmp_path, *names))
    assert len({each.key for each in records}) == len(names)
    assert {each.path: each.key for each in records}["a/1.jpg"] == "a/1"


def test_names_that_are_no_text_become_classes_and_samples(tmp_path: Path) -> None:
    root = tmp_path / "in"
    names = [
        b"caf\xe9/1\xff.png",
        b"caf\xc3\xa9/1.png",
        b"\n\x1b[31m/\t.png",
        ("n" * 200 + "/" + "i" * 200 + ".png").encode(),
    ]
    try:
        touch(root, *names)
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    for number, name in enumerate(names):
        Path(os.fsdecode(os.path.join(os.fsencode(root), name))).write_bytes(picture(number))
    assert run(root, tmp_path / "out").num_samples == 4
    assert sorted(class_names(tmp_path / "out")) == ["\n\x1b[31m", r"caf\xe9", "café", "n" * 200]
    assert all(key.isprintable() for key in samples(tmp_path / "out"))


def test_two_folders_that_would_be_one_identity_are_refused(tmp_path: Path) -> None:
    try:
        touch(tmp_path, b"caf\xe9/1.png", rb"caf\xe9/1.png")
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    with pytest.raises(InvalidData, match="two folders would be identity"):
        FolderPerIdentity(tmp_path).parts()


def test_splits_above_the_identities_are_not_taken_for_these(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_folders(tmp_path / "in" / split, {"ada": 2, "ben": 1})
    with pytest.raises(InvalidData, match=r"called train, val: splits, not identities; .* such as .*in/train$"):
        run(tmp_path / "in", tmp_path / "out")
    run(tmp_path / "in" / "train", tmp_path / "out")
    assert class_names(tmp_path / "out") == ["ada", "ben"]


def test_images_without_identity_folders_are_no_source(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="expected a folder for each identity, found none"):
        run(touch(tmp_path / "in", "1.jpg", "2.jpg"), tmp_path / "out")
    (tmp_path / "in" / "a").mkdir()
    with pytest.raises(InvalidData, match="no images were found: 2 × image beside the identity folders"):
        run(tmp_path / "in", tmp_path / "out")


def test_a_file_that_is_gone_since_it_was_listed_ends_the_conversion(tmp_path: Path) -> None:
    source = FolderPerIdentity(touch(tmp_path, "a/1.jpg", "a/2.jpg"))
    records, _ = listed(tmp_path)
    (tmp_path / "a" / "1.jpg").unlink()
    with pytest.raises(DataUnavailable, match=r"1\.jpg cannot be read: No such file or directory; was the"):
        list(source.read(records))
    (tmp_path / "a" / "1.jpg").write_bytes(b"longer than it was")
    with pytest.raises(DataUnavailable, match="larger than 5 bytes; was the source changed"):
        list(source.read(records))


def test_a_file_that_the_permissions_forbid_is_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folders(tmp_path / "in", {"a": 3})
    real = folders.read_bounded

    def read(path: str, limit: int) -> bytes:
        if path.endswith("001.png"):
            raise PermissionError(13, "Permission denied")
        return real(path, limit)

    monkeypatch.setattr(folders, "read_bounded", read)
    assert run(source, tmp_path / "out", max_bad=0.5).num_bad == 1
    assert "a/001,permission denied" in (tmp_path / "out" / "bad.csv").read_text()


def test_a_file_larger_than_any_image_is_a_bad_image_and_not_read(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "in", {"a": 3})
    with (source / "a" / "001.png").open("r+b") as file:
        file.truncate(1 << 33)
    assert run(source, tmp_path / "out", max_bad=0.5).num_bad == 1
    assert "bytes, more than an image can have" in (tmp_path / "out" / "bad.csv").read_text()


def test_many_identities_are_listed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path / "in", {f"{i:02d}": 1 for i in range(12)})
    run(root, tmp_path / "one")
    monkeypatch.setattr(folders, "_IDENTITIES_IN_PART", 5)
    assert len(FolderPerIdentity(root).parts()) == 1 + 3
    run(root, tmp_path / "many")
    assert content(tmp_path / "one") == content(tmp_path / "many")
