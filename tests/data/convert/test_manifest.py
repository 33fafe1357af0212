"""Manifests: CSV, TSV and JSON Lines that name images or hold them."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partialfc.data.convert import manifest, rows
from partialfc.data.convert.fields import Fields
from partialfc.data.convert.manifest import Manifest
from partialfc.data.convert.source import Record, Skipped, Unreadable
from partialfc.errors import InvalidData
from tests.harness.data_sets import png


def table(folder: Path, text: str | bytes, name: str = "set.csv", images: tuple[str, ...] = ()) -> Manifest:
    for number, image in enumerate(images):
        path = folder / os.fsdecode(image.encode())  # UTF-8 in any locale
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Manifest(folder / name)


def listed(source: Manifest) -> list[Record | Skipped]:
    source.fingerprint()
    return [each for part in source.parts() for each in source.list_part(part)]


def records(source: Manifest) -> list[Record]:
    return [each for each in listed(source) if isinstance(each, Record)]


def content(source: Manifest) -> list[tuple[str, str, bytes | str]]:
    """Key, identity and image, or why there is none; read in reverse and by a copy, as another process would."""
    found = records(source)
    images = list(
        pickle.loads(pickle.dumps(source)).read(
            [Record(r.key, "", r.path, r.file, r.offset, r.size) for r in found[::-1]]
        )
    )
    texts = [image.reason if isinstance(image, Unreadable) else image for image in images[::-1]]
    return [(record.key, record.identity, text) for record, text in zip(found, texts, strict=True)]


def as_rows(pairs: list[tuple[str, str]], form: str) -> str:
    if form == "jsonl":
        return "".join(json.dumps({"path": path, "identity": name, "more": [1]}) + "\n" for path, name in pairs)
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if form == "tsv" else ",")
    writer.writerows([("path", "more", "identity"), *((path, "x", name) for path, name in pairs)])
    return text.getvalue()


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "ndjson"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_images_are_read_by_their_paths(tmp_path: Path, form: str, mark: bytes) -> None:
    pairs = [("a/1.png", "Ann"), ("./b/2.x.png", "Łukasz, 2nd"), ("ü\u3042/3.png", "Ann")]
    text = mark + as_rows(pairs, "jsonl" if form == "ndjson" else form).encode()
    source = table(tmp_path, text, f"set.{form}", ("a/1.png", "b/2.x.png", "ü\u3042/3.png"))
    assert content(source) == [
        ("a/1", "Ann", png(0)),
        ("b/2%2Ex", "Łukasz, 2nd", png(1)),
        ("ü\u3042/3", "Ann", png(2)),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quotes_line_breaks_empty_lines_and_a_missing_last_one_are_csv(tmp_path: Path, end: str) -> None:
    lines = ['"path",label', '"a,b.png","Two', 'lines, ""quoted"""', "", "  ", "c.png,x"]
    source = table(tmp_path, end.join(lines), images=("a,b.png", "c.png"))
    assert content(source) == [("a,b", f'Two{end}lines, "quoted"', png(0)), ("c", "x", png(1))]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_csv_may_have_semicolons_or_tabs(tmp_path: Path, delimiter: str) -> None:
    source = table(tmp_path, f"file{delimiter}class\na.png{delimiter}1,5\n", images=("a.png",))
    assert content(source) == [("a", "1,5", png(0))]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_images_may_stand_in_the_table_in_base64(tmp_path: Path, form: str) -> None:
    text = base64.b64encode(png(7)).decode()
    wrapped = "\n".join(text[i : i + 20] for i in range(0, len(text), 20))
    values = [text, wrapped, f"data:image/png;base64,{text}", "data:text/plain,hello", "no base64!", "A"]
    if form == "csv":
        lines = "bytes,label\n" + "".join(f'"{value}",a\n' for value in values)
    else:
        lines = "".join(json.dumps({"bytes": value, "label": "a"}) + "\n" for value in values)
    found = [image for _, _, image in content(table(tmp_path, lines, f"set.{form}"))]
    assert found[:4] == [png(7)] * 3 + ["is a data: URL, but not in base64"]
    assert all(str(image).startswith("is not base64: ") for image in found[4:])


def test_keys_come_from_paths_from_a_column_or_from_the_place_of_the_row(tmp_path: Path) -> None:
    data = "data:;base64," + base64.b64encode(png(1)).decode()
    text = f'path,label,id\na.b/1.jpg,x,first/1.0\n"{data}",x,7\n'
    source = table(tmp_path, text)
    assert [record.key for record in records(source)] == ["a.b/1", f"{text.index('data') - 1:012d}"]
    source = Manifest(source.path, fields=Fields(key="id"))
    assert [record.key for record in records(source)] == ["first/1%2E0", "7"]
    nameless = table(tmp_path, '{"path": "a.png", "label": 1, "id": "b"}\n{"path": "a.png", "label": 1}\n', "set.jsonl")
    with pytest.raises(InvalidData, match="row at byte 41: the key is empty"):
        records(Manifest(nameless.path, fields=Fields(key="id")))


def test_numbers_are_identities_in_decimal(tmp_path: Path) -> None:
    lines = [{"path": "a.png", "label": 12345678901234567890}, {"path": "b.png", "label": "007"}]
    source = table(tmp_path, "".join(json.dumps(line) + "\n" for line in lines), "set.jsonl")
    assert [record.identity for record in records(source)] == ["12345678901234567890", "007"]


def test_rows_without_image_or_identity_are_counted(tmp_path: Path) -> None:
    source = table(tmp_path, "path,label\n,x\na.png,\nb.png,y\n")
    assert [each if isinstance(each, Skipped) else each.identity for each in listed(source)] == [
        Skipped("row without an image"),
        Skipped("row without an identity"),
        "y",
    ]
    lines = '{"path": null, "label": 1}\n\n{"path": "a.png"}\n{"label": 1}\n'
    assert [each.reason for each in listed(table(tmp_path, lines, "set.jsonl")) if isinstance(each, Skipped)] == [
        "row without an image",
        "row without an identity",
        "row without an image",
    ]


def test_the_columns_are_chosen_by_options_and_never_guessed(tmp_path: Path) -> None:
    source = table(tmp_path, "path,label,name\na.png,1,Ann\n")
    with pytest.raises(InvalidData, match=r"several could be meant, there are 'label', 'name'; .* with --label-field"):
        source.fingerprint()
    chosen = Manifest(source.path, fields=Fields(label="name"))
    assert [record.identity for record in records(chosen)] == ["Ann"]
    assert chosen.fingerprint() != Manifest(source.path, fields=Fields(label="label")).fingerprint()
    with pytest.raises(InvalidData, match=r"a column 'nme' was expected, there are 'path', 'label', 'name'"):
        Manifest(source.path, fields=Fields(label="nme")).fingerprint()
    with pytest.raises(InvalidData, match=r"a column path, file, image.* was expected, there are 'a', 'label'"):
        table(tmp_path, "a,label\n").fingerprint()
    assert [r.identity for r in records(table(tmp_path, " Path ,LABEL\na.png,1\n"))] == ["1"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("s.csv", b"", "is empty"),
        ("s.jsonl", b"\n\n", "in its first row: a column .* there are none"),
        ("s.csv", "path,label\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("s.csv", b"path,label\na.png,\xff\n", "byte 17 is not UTF-8"),
        ("s.csv", b"path,label\na.png,1,2\n", "row at byte 11: 3 fields, where the header has 2"),
        ("s.csv", b"path,label\na.png,1\nb.png\n", "row at byte 19: 1 fields"),
        ("s.csv", b'path,label\n"a"b,1\n', "row at byte 11: "),
        ("s.csv", b'path,label\n"a,1\n' + b"b,1\n" * 30_000, "row at byte 11: .* quotation mark missing"),
        ("s.csv", b'path,label\n"a,1\n', "row at byte 11: unexpected end"),
        ("s.csv", b"path,label\ra.png,1\r", "new-line character"),
        ("s.jsonl", b'{"path": "a", "label": 1}\n{"path": \n', "row at byte 26: not JSON"),
        ("s.jsonl", b'{"path": "a", "label": 1}\n[1]\n', "row at byte 26: expected a JSON object"),
        ("s.jsonl", b'{"path": "a", "label": 1}\n' + b"[" * 90_000 + b"\n", "not JSON: nested too deeply"),
        (
            "s.jsonl",
            b'{"path": "a", "label": 1.5}\n',
            "row at byte 0: an identity or key must be a text or a whole number",
        ),
        ("s.jsonl", b'{"path": "a", "label": true}\n', "must be a text or a whole number, got True"),
        ("s.jsonl", b'{"path": "a", "label": "\\ud800"}\n', "surrogates not allowed"),
        ("s.jsonl", b'{"path": ["a"], "label": 1}\n', "column 'path' must hold texts, got list"),
    ],
)
def test_a_damaged_table_is_refused_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: bytes, words: str
) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 100_000)
    with pytest.raises(InvalidData, match=words) as refused:
        listed(table(tmp_path, text, name))
    assert str(refused.value).startswith(f"{tmp_path}/{name}")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "path", ["../a.png", "x/../../a.png", "/etc/passwd", "..", ".", "x/..", "https://host/a.png", "file:///a.png"]
)
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "set").mkdir()
    source = table(tmp_path / "set", f"path,label\n{path},1\n")
    with pytest.raises(InvalidData, match=r"row at byte 11: .* (leads out of .*; pass --images|is a URL)"):
        listed(source)


def test_another_folder_of_images_is_an_option_and_absolute_paths_may_lie_in_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    table(tmp_path / "images", "", images=("a/1.png", "a/2.png"))
    text = f"path,label\na/1.png,x\n{tmp_path}/images/a/../a/2.png,x\n"
    source = Manifest(table(tmp_path, text).path, images=tmp_path / "images")
    assert content(source) == [("a/1", "x", png(0)), ("a/2", "x", png(1))]
    with pytest.raises(InvalidData, match=r"set\.csv, the folder of the images, does not exist or is no folder"):
        Manifest(source.path, images=source.path).fingerprint()


def test_what_cannot_be_read_is_unreadable_and_nothing_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "in" / "out").symlink_to(tmp_path)
    (tmp_path / "in" / "fine.png").write_bytes(png(2))
    (tmp_path / "in" / "link.png").symlink_to("fine.png")
    os.mkfifo(tmp_path / "in" / "fifo.png")
    names = ["missing.png", "fifo.png", "out/secret.png", "out", "n\0l.png", "x" * 300, "fine.png/x", "link.png"]
    found = content(table(tmp_path / "in", "path,label\n" + "".join(f"{name},x\n" for name in names)))
    assert [image for _, _, image in found] == [
        "cannot be read: No such file or directory",
        "cannot be read: not a regular file",
        f"leads out of {tmp_path}/in by a symbolic link",
        f"leads out of {tmp_path}/in by a symbolic link",
        "cannot be opened: no file can have such a name",
        "cannot be read: File name too long",
        "cannot be read: Not a directory",
        png(2),
    ]


def test_a_table_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    source = table(tmp_path, "path,label\na.png,1\n", images=("a.png",))
    found, before = records(source), source.fingerprint()
    table(tmp_path, "path,label\n" + '"' * 20)
    assert source.fingerprint() != before
    with pytest.raises(InvalidData, match="the row at byte 11 was changed meanwhile"):
        list(source.read(found))


def test_a_fifo_is_no_manifest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "set.csv")
    with pytest.raises(InvalidData, match=r"set\.csv cannot be read: not a regular file"):
        Manifest(tmp_path / "set.csv").fingerprint()


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_rows_take_no_memory_once_they_are_listed(tmp_path: Path, form: str) -> None:
    source = table(tmp_path, as_rows([(f"{i:0100d}.png", "x") for i in range(5000)], form), f"set.{form}")
    (part,) = source.parts()
    tracemalloc.start()
    try:
        assert sum(1 for _ in source.list_part(part)) == 5000
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()


def test_files_are_matched_by_their_names() -> None:
    assert [Manifest.matches(Path(name)) for name in ("a.csv", "b.TSV", "c.jsonl", "d.ndjson")] == [True] * 4
    assert [Manifest.matches(Path(name)) for name in ("a.json", "csv", "b.csv.gz")] == [False] * 3


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=8)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(TEXTS, max_size=12),
    form=st.sampled_from(["csv", "tsv", "jsonl"]),
    step=st.integers(1, 60),
    blank=st.booleans(),
)
def test_any_text_is_an_identity_and_any_split_lists_every_row_once(
    tmp_path: Path, names: list[str], form: str, step: int, blank: bool
) -> None:
    pairs: list[tuple[Any, str]] = [(f"{number}.png", name) for number, name in enumerate(names)]
    text = as_rows(pairs or [("", "")], form)
    if blank and form == "jsonl":
        text = text.replace("\n", "\n\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "_PART_BYTES", step)
        found = records(table(tmp_path, text, f"set.{form}"))
    assert [(f"{record.key}.png", record.identity) for record in found] == pairs
