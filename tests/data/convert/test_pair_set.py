"""Sets of pairs become verification folders."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from partialfc.data.convert.pair_set import convert_pairs, is_pair_set
from partialfc.data.dataset import TarDataset
from partialfc.data.pairs import read_pairs
from partialfc.errors import ConfigError, InvalidData
from partialfc.evaluate.sets import open_set
from tests.harness.data_sets import png
from tests.harness.running import partialfc

FIXTURES = Path(__file__).parents[2] / "fixtures" / "insightface"


@pytest.mark.parametrize("name", ["val_py2", "val_lfw_like"])
def test_a_genuine_file_becomes_a_set_with_its_images_pairs_and_folds(tmp_path: Path, name: str) -> None:
    assert is_pair_set(FIXTURES / f"{name}.bin")
    report = convert_pairs(FIXTURES / f"{name}.bin", tmp_path / "set")
    expected = json.loads((FIXTURES / f"{name}.expected.json").read_text())
    digests = [each["sha256"] for each in expected["images"]]
    dataset = TarDataset(tmp_path / "set")
    stored = [hashlib.sha256(dataset.read(i)).hexdigest() for i in range(len(dataset))]
    assert sorted(stored) == sorted(set(digests)), "each image once, byte for byte"
    pairs = read_pairs(tmp_path / "set", dataset.keys)
    assert [stored[i] for i in pairs.first] == digests[::2]
    assert [stored[i] for i in pairs.second] == digests[1::2]
    assert pairs.same.tolist() == expected["issame"]
    assert pairs.folds.tolist() == sorted(pairs.folds.tolist())
    assert (report.pairs, report.folds, report.stored) == (expected["num_pairs"], 10, len(stored))
    assert open_set(tmp_path / "set").pairs is not None
    labels = dataset.labels
    assert all(labels[pairs.first[pairs.same]] == labels[pairs.second[pairs.same]])


def _write_lfw(root: Path) -> Path:
    for number, name in enumerate(("Ann", "Bob", "Cid")):
        (root / name).mkdir(parents=True)
        for image in (1, 2):
            (root / name / f"{name}_000{image}.png").write_bytes(png(40 * number + image))
    (root / "Cid" / "Cid_0002.png").write_bytes((root / "Bob" / "Bob_0002.png").read_bytes())
    Image.new("RGB", (8, 8), "red").save(root / "Ann" / "Ann_0003.bmp")
    list_file = root / "pairs.txt"
    list_file.write_text(
        "2 2\nAnn 1 2\nBob 1 2\nAnn 1 Bob 2\nAnn 2 Cid 1\nAnn 1 3\nBob 1 2\nAnn 1 Cid 2\nCid 1 Bob 1\n"
    )
    return list_file


def test_the_images_of_a_list_are_stored_once_under_their_names(tmp_path: Path) -> None:
    list_file = _write_lfw(tmp_path / "lfw")
    (tmp_path / "lfw" / "LICENSE").write_text("for research")
    report = convert_pairs(list_file, tmp_path / "set")
    assert json.loads((tmp_path / "set" / "index.json").read_text())["source"] == {
        **{"kind": "pair-list", "name": "pairs.txt", "licence": "for research"},
    }
    dataset = TarDataset(tmp_path / "set")
    assert dataset.keys == [
        *("Ann/Ann_0001", "Ann/Ann_0002", "Bob/Bob_0001", "Bob/Bob_0002", "Cid/Cid_0001", "Ann/Ann_0003"),
    ], "Cid's second image equals Bob's"
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 0]
    assert [entry["name"] for entry in dataset.classes] == ["Ann/Ann_0001", "Bob/Bob_0001", "Cid/Cid_0001"]
    assert dataset.read(5).startswith(b"\x89PNG"), "a BMP is stored as a PNG"
    assert (report.images, report.stored, report.genuine, report.contradictions) == (7, 6, 4, 0)
    assert "Ann/Ann_0001,Bob/Bob_0002,0,1" in (tmp_path / "set" / "pairs.csv").read_text().splitlines()


def test_pairs_that_contradict_one_another_are_counted(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(png(ord(name)))
    (tmp_path / "pairs.txt").write_text("a.png b.png 1\nb.png c.png 1\na.png c.png 0\n")
    assert convert_pairs(tmp_path / "pairs.txt", tmp_path / "set").contradictions == 1
    assert TarDataset(tmp_path / "set").num_classes == 1


def test_images_whose_keys_would_be_equal_get_different_ones(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    Image.new("L", (8, 8), 7).save(tmp_path / "a.jpg")
    (tmp_path / "J.K._R").write_bytes(png(2))
    (tmp_path / "pairs.txt").write_text("a.png a.jpg 1\na.png J.K._R 0\n")
    convert_pairs(tmp_path / "pairs.txt", tmp_path / "set")
    first, second, third = TarDataset(tmp_path / "set").keys
    assert first == "a"
    assert second.startswith("a~")
    assert third == "J%2EK%2E_R"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "a.png gone.png 1",
            r"names gone\.png, and there is no such image in .*; name the folder of the images: --images",
        ),
        ("a.png text.jpg 1", r"pairs\.txt: image text\.jpg "),
        ("a.png link.png 1", "is a link that leads out of"),
    ],
)
def test_a_set_without_some_of_its_images_is_refused(tmp_path: Path, line: str, words: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(1))
    (folder / "text.jpg").write_text("no image")
    (tmp_path / "secret.png").write_bytes(png(3))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "pairs.txt").write_text(f"a.png a.png 0\n{line}\n")
    with pytest.raises(InvalidData, match=words) as refused:
        convert_pairs(folder / "pairs.txt", tmp_path / "set")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "set").exists()


def test_a_bin_takes_no_folder_of_images_and_a_full_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--images: .*val_py2\.bin holds its images itself"):
        convert_pairs(FIXTURES / "val_py2.bin", tmp_path / "set", images=tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "precious").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty"):
        convert_pairs(FIXTURES / "val_py2.bin", tmp_path / "set")
    convert_pairs(FIXTURES / "val_py2.bin", tmp_path / "set", overwrite=True)
    assert (tmp_path / "set" / "precious").exists()


def test_an_image_of_a_bin_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(pickle.dumps(([png(1), png(2)[:40]], [True])))
    with pytest.raises(InvalidData, match=r"x\.bin: image 1 "):
        convert_pairs(tmp_path / "x.bin", tmp_path / "set")


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert_pairs(FIXTURES / "val_py2.bin", tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["classes.jsonl", "index.json", "pairs.csv", "shard-000000.tar"]
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_the_command_converts_pairs_and_refuses_options_that_would_change_the_benchmark(tmp_path: Path) -> None:
    source = FIXTURES / "val_py2.bin"
    done = partialfc("data", "convert", source, "--out", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert "15 pairs in 10 folds, 8 of the same identity; 22 images (30 with equal ones)" in done.stdout
    for option in (["--min-samples", 2], ["--max-bad", 0.5], ["--workers", 2], ["--label-field", "x"]):
        choice = partialfc("data", "convert", source, "--out", tmp_path / "other", *option)
        assert choice.returncode == 2, option
        assert "is a set of pairs: it is converted as a whole" in choice.stderr
    lists = _write_lfw(tmp_path / "lfw").rename(tmp_path / "list.txt")
    words = ["--images", tmp_path / "lfw", "--out", tmp_path / "lfw-set"]
    unnamed = partialfc("data", "convert", lists, *words)
    assert unnamed.returncode == 2, "what is not named a list of pairs may be any list"
    done = partialfc("data", "convert", lists, *words, "--format", "pairs")
    assert done.returncode == 0, done.stderr
