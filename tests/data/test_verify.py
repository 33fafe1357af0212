"""``partialfc data verify`` finds what is wrong with a set, and says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from partialfc.data.dataset import DatasetWriter
from partialfc.data.verify import verify
from partialfc.errors import DataUnavailable
from tests.harness.data_sets import edit_json, forget_digests, png, write_samples
from tests.harness.running import partialfc
from tests.harness.tars import sample_members, write_tar

PIXELS = 10_000


def problems(source: Any, **options: Any) -> list[str]:
    found = verify(source, PIXELS, workers=1, **options).problems
    assert len(found.found) == min(found.count, 100)
    return found.found


def edit_table(folder: Path, change: Callable[[str], str]) -> None:
    table = folder / "classes.jsonl"
    table.write_text(change(table.read_text()))


def edit_bytes(path: Path, old: bytes, new: bytes, more: int = 0) -> None:
    """Replace bytes, or those ``more`` after them."""
    content = bytearray(path.read_bytes())
    place = content.index(old) + more
    content[place : place + len(new)] = new
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "d", [0, 1, 2, 1, 0], samples_per_shard=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_set_is_well(folder: Path, workers: int) -> None:
    found = verify(folder, PIXELS, workers)
    assert (found.problems.found, found.num_shards, found.num_samples) == ([], 3, 5)
    assert found.num_bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))


def test_sets_of_other_tools_are_well_without_digests_and_counts(tmp_path: Path, folder: Path) -> None:
    forget_digests(folder)
    edit_table(folder, lambda text: text.replace(', "samples": 2', ""))
    assert problems(folder) == []
    (folder / "classes.jsonl").unlink()
    assert problems(folder) == []
    write_tar(tmp_path / "a.tar", sample_members(["one", "two"], image=b""), 0)
    assert len(problems(tmp_path / "a.tar")) == 2, "they are no images"


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "index missing": (lambda folder: (folder / "index.json").unlink(), ["index.json is missing"]),
    "shard missing": (lambda folder: (folder / "shard-000001.tar").unlink(), ["shard shard-000001.tar is missing"]),
    "table missing": (
        lambda folder: (folder / "classes.jsonl").unlink(),
        ["classes.jsonl is missing", "cannot be read"],
    ),
    "table edited": (
        lambda folder: edit_table(folder, lambda text: text.replace('"samples": 2', '"samples": 3', 1)),
        ["one of them was changed", "class 0 has 3 samples there, and 2 in the shards"],
    ),
    "table short": (
        lambda folder: edit_table(folder, lambda text: text.partition("\n")[0] + "\n"),
        ["one of them was changed", "expected 4 classes"],
    ),
    "size": (
        lambda folder: edit_json(folder / "index.json", lambda index: index["shardlist"][0].update(nbytes=5)),
        ["shard-000000.tar: the index says 5 bytes, the file has"],
    ),
    "samples": (
        lambda folder: edit_json(
            folder / "index.json", lambda index: (index["shardlist"][0].update(nsamples=1), index.update(num_samples=4))
        ),
        ["shard-000000.tar: the index says 1 samples, the shard holds 2"],
    ),
    "sha256": (
        lambda folder: edit_bytes(folder / "shard-000000.tar", b"IHDR", b"J"),
        ["shard-000000.tar: the index says sha256", "sample 's0000' cannot be decoded"],
    ),
    "label": (
        lambda folder: edit_bytes(folder / "shard-000000.tar", b"s0001.cls", b"7", 512),
        ["sha256", "sample 's0001' has label b'7', not one of 0..3", "class 1 has 2 samples there, and 1"],
    ),
    "header": (
        lambda folder: edit_bytes(folder / "shard-000001.tar", b"s0003.png", b"x"),
        ["sha256", "shard-000001.tar: header at byte"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_is_listed_with_its_place(folder: Path, name: str) -> None:
    damage, expected = DAMAGES[name]
    damage(folder)
    found = problems(folder)
    assert len(found) == len(expected), found
    for words, problem in zip(expected, found, strict=True):
        assert words in problem


def test_images_are_bounded_and_problems_too(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "d", samples_per_shard=90) as writer:
        writer.write("large", png(1, size=101), "png", 0)
        for i in range(150):
            writer.write(f"{i}", b"no image", "png", 0)
        writer.finish([{"name": "a"}])
    found = verify(tmp_path / "d", PIXELS, 1).problems
    assert (found.count, len(found.found)) == (151, 100)
    assert "sample 'large' has 101 × 101 pixels" in found.found[0]
    assert "sample '0' cannot be decoded: not a PNG" in found.found[1]


def test_labels_of_two_kinds_in_a_plain_set_are_a_problem(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample_members([0]))
    write_tar(tmp_path / "b.tar", sample_members(["one"]))
    (problem,) = problems([tmp_path / "a.tar", tmp_path / "b.tar"])
    assert "labels of another kind" in problem


def test_a_shard_that_cannot_be_read_now_is_no_problem_of_the_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("partialfc.data.verify.walk_samples", fail)
    with pytest.raises(DataUnavailable, match="Input/output error"):
        verify(folder, PIXELS, 1)


def test_the_command_says_so_by_its_code(folder: Path) -> None:
    done = partialfc("data", "verify", folder)
    assert (done.returncode, "5 samples in 3 shards" in done.stdout, "all is well" in done.stdout) == (0, True, True)
    edit_bytes(folder / "shard-000000.tar", b"s0001.cls", b"7", 512)
    done = partialfc("data", "verify", folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder}: 3 problems, the first 3 above; read: 5 samples")
    assert "has label b'7'" in done.stdout
    shards = [folder / f"shard-00000{i}.tar" for i in range(3)]
    assert partialfc("data", "verify", *shards).returncode == 0, "as plain shards, 7 is a class"
