"""Class tables: read to the end, and matched by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from partialfc.data.class_table import match_classes, require_class_table
from partialfc.errors import InvalidData
from tests.harness.data_sets import write_table


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"id": 0, "name": "a"}\n', "expected 2 classes, one a line; it has only 1"),
        ('{"id": 0, "name": "a"}\n{"id": 1, "name": "b"}\n{"id": 2, "name": "c"}\n', "it has more than 2"),
        ('{"id": 1, "name": "a"}\n{"id": 0, "name": "b"}\n', "line 1 is not a class with 'id' 0 and a 'name'"),
        ('{"id": 0, "name": "a"}\n{"id": 1}\n', "line 2 is not a class"),
        ('{"id": false, "name": "a"}\n{"id": 1, "name": "b"}\n', "line 1 is not a class"),
        ("id,name\n0,a\n", "line 1 is not JSON"),
        ('{"id": 0, "name": "a"}\n\n', "line 2 is not JSON"),
        ("[" * 60_000 + "\n", "line 1 is not JSON: nested too deeply"),
        ('{"id": 0, "name": "' + "a" * 70_000 + '"}\n', "line 1 is longer than 65,536 bytes"),
        ("\udcff", "line 1 is not JSON"),
    ],
)
def test_a_table_that_is_not_one_of_so_many_classes_is_refused(tmp_path: Path, text: str, words: str) -> None:
    table = tmp_path / "classes.jsonl"
    table.write_text(text, errors="surrogateescape")
    with pytest.raises(InvalidData, match=words) as refused:
        require_class_table(table, 2)
    assert len(str(refused.value)) < 500


def test_a_table_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "classes.jsonl"
    with pytest.raises(InvalidData, match="cannot be read: No such file"):
        require_class_table(table, 2)
    table.touch()
    os.truncate(table, 1 << 40)
    with pytest.raises(InvalidData, match="line 1 is longer than"):
        require_class_table(table, 2)


@pytest.mark.parametrize(
    ("names", "trained", "ids"),
    [
        (["a", "b"], ["a", "b", "c"], [0, 1]),
        (["a", "b", "c"], ["a", "b", "c"], [0, 1, 2]),
        (["c", "a"], ["a", "b", "c"], [2, 0]),
        ([3, "b"], ["b", "3"], [1, 0]),
        ([], ["a"], []),
    ],
)
def test_classes_are_matched_by_name(tmp_path: Path, names: list[Any], trained: list[Any], ids: list[int]) -> None:
    table, other = write_table(tmp_path / "table", names), write_table(tmp_path / "trained", trained)
    assert match_classes(table, other, len(names)).tolist() == ids


@pytest.mark.parametrize(
    ("names", "trained", "words"),
    [
        (["a", "x", "y"], ["a", "b", "c"], r"2 of 3 classes are not in .*trained, the first is class 1, 'x'"),
        (["a", "b", "c"], ["a", "b"], r"1 of 3 classes are not in .*, the first is class 2, 'c'"),
        (["b", "b"], ["a", "b"], "table: classes 0 and 1 are both called 'b'"),
        (["b"], ["a", "b", "b"], "trained: classes 1 and 2 are both called 'b'"),
    ],
)
def test_unknown_and_ambiguous_names_are_refused(
    tmp_path: Path, names: list[Any], trained: list[Any], words: str
) -> None:
    table, other = write_table(tmp_path / "table", names), write_table(tmp_path / "trained", trained)
    with pytest.raises(InvalidData, match=words):
        match_classes(table, other, len(names))
