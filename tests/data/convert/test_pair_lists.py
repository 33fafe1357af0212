"""Lists of pairs in the forms that benchmarks publish, and lists that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.data.convert.pair_lists import is_pair_list, read_pair_list
from partialfc.data.pairs import Pair
from partialfc.errors import InvalidData


def _written(tmp_path: Path, text: str, name: str = "pairs.txt") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


LFW_SAME = [Pair("Abel_Pacheco/Abel_Pacheco_0001", "Abel_Pacheco/Abel_Pacheco_0004", True, fold) for fold in (0, 1)]
LFW_DIFFERENT = [Pair("Abdel_Madi/Abdel_Madi_0001", "Dean_Barker/Dean_Barker_0012", False, fold) for fold in (0, 1)]
SAME_LINE, DIFFERENT_LINE = "Abel_Pacheco\t1\t4\n", "Abdel_Madi\t1\tDean_Barker\t12\n"


@pytest.mark.parametrize("separator", ["\t", " ", "   "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lfws_pairs_are_read_with_its_folds(tmp_path: Path, separator: str, end: str) -> None:
    text = "2\t1\n" + (SAME_LINE + DIFFERENT_LINE) * 2
    path = _written(tmp_path, text.replace("\t", separator).replace("\n", end))
    assert is_pair_list(path)
    pairs = read_pair_list(path)
    assert pairs == [LFW_SAME[0], LFW_DIFFERENT[0], LFW_SAME[1], LFW_DIFFERENT[1]]


def test_the_ten_folds_of_lfw_are_found_with_and_without_its_header(tmp_path: Path) -> None:
    lines = "".join(f"same{fold} 1 {n}\n" for fold in range(10) for n in range(2, 5))
    text = "".join(
        "".join(f"same{fold} 1 {n}\n" for n in range(2, 5)) + "".join(f"a{fold} 1 b {n}\n" for n in range(3))
        for fold in range(10)
    )
    for header in ("10 3\n", "", "30\n"):  # the last is that of LFW's view for development, without folds
        pairs = read_pair_list(_written(tmp_path, header + text))
        assert len(pairs) == 60
        for pair in pairs:
            assert f"{pair.first.partition('/')[0]}".lstrip("same") == str(pair.fold)
    assert [pair.fold for pair in read_pair_list(_written(tmp_path, lines))] == [
        fold for fold in range(10) for _ in "abc"
    ]


def test_three_columns_are_read_as_agedb_is_published(tmp_path: Path) -> None:
    path = _written(tmp_path, "img/1.jpg img/2.jpg 1\nimg/3.jpg img/2.jpg 0\nimg/4.jpg img/1.jpg -1\n")
    assert is_pair_list(path)
    assert read_pair_list(path) == [
        Pair("img/1.jpg", "img/2.jpg", True, 0),
        Pair("img/3.jpg", "img/2.jpg", False, 0),
        Pair("img/4.jpg", "img/1.jpg", False, 1),
    ]


def test_two_lines_are_a_pair_of_calfw_and_cplfw(tmp_path: Path) -> None:
    path = _written(tmp_path, "A_0001.jpg 1\nA_0002.jpg 1\nB_1.jpg 7\nB_2.jpg 7\nA_0001.jpg 0\nB_1.jpg 0\n")
    assert is_pair_list(path)
    assert [pair[:3] for pair in read_pair_list(path)] == [
        ("A_0001.jpg", "A_0002.jpg", True),
        ("B_1.jpg", "B_2.jpg", True),
        ("A_0001.jpg", "B_1.jpg", False),
    ]


def test_a_csv_is_read_by_its_header(tmp_path: Path) -> None:
    path = _written(tmp_path, 'first, second,same,fold\n"a, b/1.png",c.jpg,1,3\nc.jpg,d.jpg,false,4\n', "list.csv")
    assert is_pair_list(path)
    assert read_pair_list(path) == [Pair("a, b/1.png", "c.jpg", True, 3), Pair("c.jpg", "d.jpg", False, 4)]


def _write_cfp(root: Path) -> Path:
    protocol = root / "Protocol"
    protocol.mkdir(parents=True)
    for letter, kind in (("F", "frontal"), ("P", "profile")):
        lines = [f"{n} ../Data/Images/00{n}/{kind}/0{n}.jpg\n" for n in (1, 2, 3)]
        (protocol / f"Pair_list_{letter}.txt").write_text("".join(lines))
    for name in ("FP", "FF"):
        for fold in ("01", "02", "10"):
            (protocol / "Split" / name / fold).mkdir(parents=True)
            (protocol / "Split" / name / fold / "same.txt").write_text("1,1\n2,2\n")
            (protocol / "Split" / name / fold / "diff.txt").write_text(f"1,{int(fold) % 2 + 2}\n")
    return protocol / "Split"


def test_a_protocol_of_cfp_is_a_folder_of_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = _write_cfp(tmp_path)
    assert is_pair_list(split / "FP")
    monkeypatch.chdir(split)
    assert read_pair_list(Path("FP")) == read_pair_list(split / "FP"), "named from within"
    with pytest.raises(InvalidData, match=r"is no list of pairs; of folders, only a protocol of CFP is"):
        read_pair_list(split)
    pairs = read_pair_list(split / "FP")
    assert [pair.fold for pair in pairs] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert pairs[0] == Pair("Data/Images/001/frontal/01.jpg", "Data/Images/001/profile/01.jpg", True, 0)
    assert pairs[2] == Pair("Data/Images/001/frontal/01.jpg", "Data/Images/003/profile/03.jpg", False, 0)
    assert read_pair_list(split / "FF")[1].second == "Data/Images/002/frontal/02.jpg"
    (split / "FP" / "02" / "diff.txt").write_text("1,9\n")
    with pytest.raises(InvalidData, match=r"02/diff\.txt: line 1: there is no image 9"):
        read_pair_list(split / "FP")
    (split / "FP" / "02" / "diff.txt").unlink()
    with pytest.raises(InvalidData, match=r"02/diff\.txt cannot be read: No such file"):
        read_pair_list(split / "FP")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10 300\nA 1 2\nA 1 B 2\n", "its first line says 3,000 pairs of each kind, and it has 1 of the same and 1 of"),
        ("A 1 2\nA one B two\n", r"line 2 is not a pair such as .*: 'A one B two'"),
        ("A_1.jpg 1\nA_2.jpg 0\n", "lines 1 and 2 are a pair, and end in different numbers, 1 and 0"),
        ("A_1.jpg 1\nA_2.jpg 1\nB_1.jpg 0\n", "expected two lines a pair, got 3 lines"),
        ("A_1.jpg 1\nA 1 2\n", "line 2 is not `image.jpg 1`"),
        ("10 300\n", "lists no pairs|its first line says"),
        ("", "lists no pairs"),
        ("../a.jpg b.jpg 1\n", r"'../a.jpg' is not a path below the folder of the images"),
        ("/etc/a.jpg b.jpg 1\n", "is not a path below the folder"),
        ("first,second,same\n/a.jpg,b.jpg,1\n", "is not a path below the folder"),
        (".. 1 2\n", "is not a path below the folder"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidData, match=words):
        read_pair_list(_written(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["", "path,identity\na.jpg,b\n", "a.jpg\nb.jpg\n", "a b\n", "just some text about pairs\n", "10 300\n"]
)
def test_other_files_are_not_taken_for_lists(tmp_path: Path, text: str) -> None:
    assert not is_pair_list(_written(tmp_path, text))
    assert not is_pair_list(_written(tmp_path, "a.jpg 1\nb.jpg 1\n", "train.txt")), "images and labels"
    assert not is_pair_list(tmp_path)
    assert not is_pair_list(tmp_path / "nothing")


@settings(max_examples=50)
@given(st.binary(max_size=200) | st.text(alphabet="ab 01\t\n,./-", max_size=200).map(str.encode))
def test_any_bytes_are_a_list_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("list") / "pairs.txt"
    path.write_bytes(content)
    is_pair_list(path)
    try:
        pairs = read_pair_list(path)
    except InvalidData:
        return
    assert pairs
    assert all(".." not in pair.first.split("/") for pair in pairs)
