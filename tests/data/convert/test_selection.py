"""What a conversion takes of a source: cleaning lists, limits, earlier class ids, identities set aside."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.data.convert import choice
from partialfc.data.convert.cleaning import read_exclusions, read_merges
from partialfc.errors import ConfigError, InvalidData
from partialfc.evaluate.sets import open_set
from tests.harness.converting import class_names, content, picture, run, samples, write_folders
from tests.harness.data_sets import write_table
from tests.harness.recordio_files import record, write_rec

IDENTITIES = {"ada": 7, "ben": 1, "eve": 4, "zoe": 11}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folders(tmp_path / "in", IDENTITIES)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.csv"
    path.write_text(text, encoding="utf-8")
    return path


def counts(folder: Path) -> Counter[str]:
    """Return the samples of each class that has some, by their keys' folder and class."""
    return Counter(name for name, _ in samples(folder).values())


def test_new_classes_come_numbers_first_by_size_then_names_by_bytes(tmp_path: Path) -> None:
    names = ["10", "9", "b", "a", "é", "B", "007", "7", "1" * 30]
    run(write_folders(tmp_path / "in", dict.fromkeys(names, 1)), tmp_path / "out")
    assert class_names(tmp_path / "out") == ["007", "7", "9", "10", "1" * 30, "B", "a", "b", "é"]


def test_identities_and_keys_are_excluded_by_a_list(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "a", exclude=written(tmp_path, "identity\nada\nben\n"))
    assert counts(tmp_path / "a") == {"eve": 4, "zoe": 11}
    assert class_names(tmp_path / "a") == ["eve", "zoe"]
    run(source, tmp_path / "b", exclude=written(tmp_path, "score,key\r\n,ada/000\r\n0.1,ben/000\r\n"))
    assert counts(tmp_path / "b") == {"ada": 6, "eve": 4, "zoe": 11}
    assert "ada/000" not in samples(tmp_path / "b")


def test_where_a_list_has_both_columns_the_key_says_which_sample_is_meant(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out", exclude=written(tmp_path, "\ufeffidentity,key\nada,ada/001\n"))
    assert counts(tmp_path / "out") == IDENTITIES | {"ada": 6}


def test_names_that_do_not_occur_are_said(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(source, tmp_path / "a", exclude=written(tmp_path, "identity\nada\nAda\n"))
    assert "list.csv: 1 identities do not occur in the source: 'Ada'" in capsys.readouterr().out
    run(source, tmp_path / "b", exclude=written(tmp_path, "key\nada/000\nada/0\nx\n"))
    assert "list.csv: 2 keys do not occur in the source: 'ada/0', 'x'" in capsys.readouterr().out
    run(source, tmp_path / "c", merge=written(tmp_path, "identity,into\nada,eva\n"))
    assert "list.csv: 1 identities do not occur in the source: 'eva'" in capsys.readouterr().out


def test_merged_identities_are_one_class_along_a_chain(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out", merge=written(tmp_path, "identity,into\nada,ben\nben,zoe\neve,eve\n"))
    assert counts(tmp_path / "out") == {"eve": 4, "zoe": 19}
    assert class_names(tmp_path / "out") == ["eve", "zoe"]


@settings(max_examples=50)
@given(st.permutations(range(8)), st.dictionaries(st.integers(0, 7), st.integers(0, 7), max_size=8))
def test_merges_end_where_following_them_does_and_circles_are_refused(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], into: dict[int, int]
) -> None:
    rows = "".join(f"{name},{into[name]}\n" for name in order if name in into)
    path = written(tmp_path_factory.mktemp("merge"), "identity,into\n" + rows)
    ends: dict[str, str] = {}
    for name in into:
        target, steps = name, 0
        while into.get(target, target) != target and steps < 10:
            target, steps = into[target], steps + 1
        if steps == 10:
            with pytest.raises(InvalidData, match="comes back to itself"):
                read_merges(path)
            return
        if target != name:
            ends[str(name)] = str(target)
    assert read_merges(path).into == ends


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the column key or identity, got "),
        ("name\nada\n", "expected the column key or identity, got name"),
        ("identity\n''\n\n,\n", "row 2: expected identity, got ','"),
        ('key,note\n"",x\n', "row 1: expected key, note, got ',x'"),
        ('identity\n"ada\n', "is not a CSV file: "),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        read_exclusions(written(tmp_path, text))


def test_lists_that_cannot_be_read_or_contradict_themselves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="No such file"):
        read_exclusions(tmp_path / "none.csv")
    with pytest.raises(InvalidData, match="'a' is to go into 'b' and into 'c'"):
        read_merges(written(tmp_path, "identity,into\na,b\na,c\n"))
    with pytest.raises(InvalidData, match="expected the columns identity and into, got identity"):
        read_merges(written(tmp_path, "identity\na\n"))
    (tmp_path / "latin").write_bytes(b"identity\ncaf\xe9\n")
    with pytest.raises(InvalidData, match="line 2 is not UTF-8"):
        read_exclusions(tmp_path / "latin")
    (tmp_path / "long").write_text("identity\n" + "a" * 70_000)
    with pytest.raises(InvalidData, match="line 2 is longer than 65,536 bytes"):
        read_exclusions(tmp_path / "long")


def test_small_classes_are_left_out_after_merging(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "a", min_samples=5)
    assert counts(tmp_path / "a") == {"ada": 7, "zoe": 11}
    run(source, tmp_path / "b", min_samples=5, merge=written(tmp_path, "identity,into\nben,eve\n"))
    assert counts(tmp_path / "b") == {"ada": 7, "eve": 5, "zoe": 11}


def test_large_classes_are_cut_to_a_choice_that_hardly_depends_on_the_others(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "a", max_samples=4)
    assert counts(tmp_path / "a") == {"ada": 4, "ben": 1, "eve": 4, "zoe": 4}
    for i in range(11, 13):
        (source / "zoe" / f"{i:03d}.png").write_bytes(picture(1000 + i))
    monkeypatch.setattr(choice, "_PIECE", 3)
    run(source, tmp_path / "b", max_samples=4)
    assert counts(tmp_path / "b") == counts(tmp_path / "a")
    first, second = set(samples(tmp_path / "a")), set(samples(tmp_path / "b"))
    new = {key for key in second if key in ("zoe/011", "zoe/012")}
    assert len(first - second) == len(new)
    assert first != {f"{name}/{i:03d}" for name, size in IDENTITIES.items() for i in range(min(4, size))}


def test_of_records_with_one_key_exactly_as_many_stay(tmp_path: Path) -> None:
    folder = write_rec(tmp_path / "in", [record(picture(i), float(i % 2)) for i in range(10)])
    places = [line.split("\t")[1] for line in (folder / "train.idx").read_text().splitlines()]
    (folder / "train.idx").write_text("".join(f"same\t{place}\n" for place in places))
    run(folder, tmp_path / "out", max_samples=3)
    assert counts(tmp_path / "out") == {"0": 3, "1": 3}
    assert set(samples(tmp_path / "out")) == {"same", *(f"same~{i}" for i in range(2, 7))}


def test_a_grown_set_keeps_the_ids_of_the_earlier_one_and_appends(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "old", exclude=written(tmp_path, "identity\nben\n"))
    table = tmp_path / "old" / "classes.jsonl"
    grown = write_folders(tmp_path / "grown", {"zoe": 2, "abe": 3, "ada": 1, "12": 2})
    run(grown, tmp_path / "new", classes=table)
    assert class_names(tmp_path / "new") == ["ada", "eve", "zoe", "12", "abe"]
    lines = (tmp_path / "new" / "classes.jsonl").read_text().splitlines()
    assert [json.loads(line)["samples"] for line in lines] == [1, 0, 2, 2, 3]
    write_table(table, ["ada", "ada"])
    with pytest.raises(InvalidData, match="classes 0 and 1 are both called 'ada'"):
        run(grown, tmp_path / "other", classes=table)


def test_identities_set_aside_are_a_verification_set_that_can_be_evaluated(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "in", {**{f"a-{i}": 3 for i in range(20)}, "single": 1})
    report = run(source, tmp_path / "out", holdout=5, samples_per_shard=4)
    verification = open_set(tmp_path / "out" / "verification")
    assert (report.verification_classes, report.verification_samples, report.num_classes) == (5, 15, 16)
    names = set(class_names(tmp_path / "out" / "verification"))
    assert names.isdisjoint(class_names(tmp_path / "out"))
    assert "single" not in names
    (protocol,) = verification.protocols
    probe, gallery = protocol.sides(verification.designs)
    assert len(probe) == 15
    assert probe.all()
    assert gallery.all()


def test_the_identities_set_aside_stay_so_when_others_come(tmp_path: Path) -> None:
    names = [f"{i}" for i in range(20)]
    run(write_folders(tmp_path / "a-in", dict.fromkeys(names, 2)), tmp_path / "a", holdout=5)
    run(write_folders(tmp_path / "b-in", dict.fromkeys([*names, "new", "newer"], 2)), tmp_path / "b", holdout=5)
    first, second = (set(class_names(tmp_path / name / "verification")) for name in "ab")
    assert len(first) == len(second) == 5
    assert first - second == first - (second | {"new", "newer"})
    assert len(first - second) == len(second & {"new", "newer"})


def test_no_class_of_an_earlier_set_is_set_aside(tmp_path: Path, source: Path) -> None:
    table = write_table(tmp_path / "old.jsonl", ["ada", "zoe"])
    with pytest.raises(ConfigError, match="2 identities are to be set aside, but only 1 have two images or more and"):
        run(source, tmp_path / "out", holdout=2, classes=table)
    with pytest.raises(ConfigError, match="one identity has no other to be compared with"):
        run(source, tmp_path / "out", holdout=1, classes=table)


@pytest.mark.parametrize("limits", [{"min_samples": 12}, {"exclude": "*"}, {"exclude": "*", "max_samples": 1}])
def test_nothing_left_is_no_data_set(tmp_path: Path, source: Path, limits: dict[str, Any]) -> None:
    if "exclude" in limits:
        everybody = "".join(f"{path.name}\n" for path in source.iterdir())
        limits = limits | {"exclude": written(tmp_path, f"identity\n{everybody}")}
    with pytest.raises(InvalidData, match="nothing is left to train on"):
        run(source, tmp_path / "out", **limits)


def test_a_table_without_classes_is_no_earlier_set(tmp_path: Path, source: Path) -> None:
    (tmp_path / "old.jsonl").touch()
    with pytest.raises(InvalidData, match=r"old\.jsonl is empty; expected the classes of an earlier set"):
        run(source, tmp_path / "out", classes=tmp_path / "old.jsonl")


@pytest.mark.parametrize(("option", "name"), [("classes", "classes.jsonl"), ("exclude", "bad.csv")])
def test_a_list_in_the_folder_to_be_replaced_is_refused_and_nothing_lost(
    tmp_path: Path, source: Path, option: str, name: str
) -> None:
    run(source, tmp_path / "out")
    (tmp_path / "out" / "bad.csv").write_text("key,reason\n")
    before = content(tmp_path / "out")
    with pytest.raises(ConfigError, match=rf"--{option} .*{name} lies in --out, whose files are replaced; copy it"):
        run(source, tmp_path / "out", overwrite=True, **{option: tmp_path / "out" / name})
    assert content(tmp_path / "out") == before
