"""The walk over a tar: what other tools write is read, and what is hostile or damaged is refused, with its place."""

from __future__ import annotations

import io
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.data.tar import END_OF_ARCHIVE, Member, TarReader
from partialfc.errors import InvalidData
from partialfc.files import open_regular
from tests.harness.tars import entry, header, make_tar, pax, pax_record, write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "folder/" + "x" * 180 + "é"


def walk_members(path: Path) -> Iterator[Member]:
    with open_regular(path) as file:
        yield from TarReader(file, path).members()


def read(path: Path) -> list[tuple[str, bytes]]:
    content = path.read_bytes()
    return [(member.name, content[member.offset : member.offset + member.size]) for member in walk_members(path)]


def with_end(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts) + END_OF_ARCHIVE)
    return path


def members_of_tarfile(archive: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar if member.isreg()]  # type: ignore[union-attr]


@pytest.mark.parametrize("format", FORMATS)
def test_all_formats_of_tarfile_are_read(tmp_path: Path, format: str) -> None:
    folder = tarfile.TarInfo("p")
    folder.type = tarfile.DIRTYPE
    long = "d" * 90 + "/" + "n" * 95 if format == "ustar" else LONG
    dated = tarfile.TarInfo("dated")
    dated.mtime = 1.5  # type: ignore[assignment]  # which PAX alone can tell
    members = [folder, ("p/a.png", b"a" * 700), ("empty", b""), (long, b"long"), dated, ("é.cls", b"3")]
    expected = [("p/a.png", b"a" * 700), ("empty", b""), (long, b"long"), ("dated", b""), ("é.cls", b"3")]
    assert read(write_tar(tmp_path / "t.tar", members, FORMATS[format])) == expected


@pytest.mark.parametrize("format", ["ustar", "gnu", "oldgnu", "posix", "v7"])
def test_all_formats_of_gnu_tar_are_read(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    names = ["a.png", "b.cls"] + (["l" * 150] if format in ("gnu", "oldgnu", "posix") else [])
    for name in names:
        (folder / name).write_bytes(name.encode())
    command = ["tar", f"--format={format}", "-C", str(folder), "-cf", str(tmp_path / "t.tar"), "--sort=name", "."]
    subprocess.run(command, check=True)
    assert read(tmp_path / "t.tar") == [(f"./{name}", name.encode()) for name in names]


def test_a_size_in_base_256_is_read(tmp_path: Path) -> None:
    size = b"\x80" + (3).to_bytes(11, "big")
    path = with_end(tmp_path / "t.tar", header(size=size), b"abc".ljust(512, b"\0"))
    assert read(path) == [("a.png", b"abc")]


@pytest.mark.parametrize("field", [0, 8**11 - 1])
def test_a_member_of_more_than_8_gib_is_stepped_over(tmp_path: Path, field: int) -> None:
    size = 8**11 + 5
    path = tmp_path / "t.tar"
    with path.open("wb") as file:  # a sparse file
        file.write(entry(pax(size=str(size)), kind=b"x") + header(size=b"%011o\0" % field))
        file.seek(file.tell() + size + -size % 512)
        file.write(entry(b"b", name=b"b.cls") + END_OF_ARCHIVE)
    assert [(member.name, member.size) for member in walk_members(path)] == [("a.png", size), ("b.cls", 1)]


def test_members_of_all_sizes_are_found_where_they_lie(tmp_path: Path) -> None:
    sizes = [0, 1, 511, 512, 513, 5_000, 20_000, 200_000, 0, 3, 131_072, 7, 16_384, 90_000, 2]
    members = [(f"m{i}", bytes([i]) * size) for i, size in enumerate(sizes)]
    assert read(write_tar(tmp_path / "t.tar", members)) == members


HOSTILE = {
    "absolute": ([entry(b"", name=b"/etc/a.png")], "leads out"),
    "upwards": ([entry(b"", name=b"x/../../a.png")], "leads out"),
    "upwards by prefix": ([entry(b"", prefix=b"..")], "leads out"),
    "nameless": ([entry(b"", name=b"")], "without a name"),
    "symbolic link": ([entry(b"", kind=b"2")], "a symbolic link"),
    "hard link": ([entry(b"", kind=b"1")], "a hard link"),
    "device": ([entry(b"", kind=b"3")], "a device"),
    "file named as a folder": ([entry(b"", name=b"a.png/")], "folder's name"),
    "FIFO": ([entry(b"", kind=b"6")], "a FIFO"),
    "sparse": ([entry(b"", kind=b"S")], "a sparse file"),
    "unknown type": ([entry(b"", kind=b"Z")], "unknown type"),
    "PAX sparse": ([entry(pax_record("GNU.sparse.major", b"1"), kind=b"x"), entry(b"")], "a sparse file"),
    "PAX path upwards": ([entry(pax(path="../a.png"), kind=b"x"), entry(b"")], "leads out"),
    "PAX path absolute": ([entry(pax(path="/a.png"), kind=b"x"), entry(b"")], "leads out"),
    "PAX path with a NUL": ([entry(pax(path="a\0b"), kind=b"x"), entry(b"")], "NUL"),
    "PAX path twice": ([entry(pax(path="a") + pax(path="b"), kind=b"x"), entry(b"")], "path twice"),
    "PAX size": ([entry(pax(size="3"), kind=b"x"), entry(b"four")], "size 3, and the header 4"),
    "PAX size of nothing": ([entry(pax(size="4"), kind=b"x"), entry(b"")], "size 4, and the header 0"),
    "PAX size negative": ([entry(pax(size="-1"), kind=b"x"), entry(b"")], "gives the size"),
    "PAX size huge": ([entry(pax(size="9" * 19), kind=b"x"), entry(b"")], "gives the size"),
    "PAX size beyond the end": ([entry(pax(size=str(8**12)), kind=b"x"), entry(b"")], "truncated"),
    "PAX not records": ([entry(b"no records", kind=b"x"), entry(b"")], "damaged PAX header"),
    "PAX record too long": ([entry(b"99 path=a\n", kind=b"x"), entry(b"")], "damaged PAX header"),
    "PAX record of length 0": ([entry(b"0 path=a\n", kind=b"x"), entry(b"")], "damaged PAX header"),
    "PAX with a length that never ends": ([entry(b"123456789 path=a\n", kind=b"x"), entry(b"")], "damaged PAX header"),
    "PAX with a record and a bare end": ([entry(pax(path="a") + b"nospace=\n", kind=b"x"), entry(b"")], "damaged PAX"),
    "PAX without an equals sign": ([entry(b"7 path\n", kind=b"x"), entry(b"")], "damaged PAX header"),
    "PAX at the end": ([entry(pax(path="a.png"), kind=b"x")], "ends after an extended header"),
    "global path": ([entry(pax(path="a.png"), kind=b"g"), entry(b"")], "all members"),
    "huge PAX header": ([header(size=b"%011o\0" % (1 << 21), kind=b"x"), bytes(1 << 21)], "extended header of"),
    "long name upwards": ([entry(b"../../a.png\0", kind=b"L"), entry(b"")], "leads out"),
    "two long names": ([entry(b"a\0", kind=b"L"), entry(pax(path="b"), kind=b"x"), entry(b"")], "different names"),
    "endless name": ([entry(b"a" * 5000, kind=b"L"), entry(b"")], "longer than"),
    "name not UTF-8": ([entry(b"", name=b"\xff.png")], "not UTF-8"),
    "folder with content": ([entry(b"x", kind=b"5")], "content"),
    "size negative": ([header(size=b"-0000000001\0")], "size"),
    "size in base 256 negative": ([header(size=b"\xff" * 12)], "size"),
    "size in base 256 overflowing": ([header(size=b"\x80\x7f" + b"\xff" * 10)], "size"),
    "size not octal": ([header(size=b"9\0")], "size"),
    "size with an underscore": ([header(size=b"0_1\0")], "size"),
    "archives joined": ([make_tar([("b.png", b"1")]), make_tar([("c.png", b"2")])], "several joined into one file"),
    "size beyond the end": ([header(size=b"%011o\0" % 9999)], "truncated"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    parts, message = HOSTILE[name]
    path = with_end(tmp_path / "t.tar", entry(b"before"), *parts)
    with pytest.raises(InvalidData, match=rf"t\.tar: header at byte \d+: .*{message}"):
        read(path)


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_a_compressed_archive_is_named_as_such(tmp_path: Path, magic: bytes) -> None:
    (tmp_path / "t.tar").write_bytes(magic.ljust(2048, b"\x55"))
    with pytest.raises(InvalidData, match="is compressed"):
        read(tmp_path / "t.tar")


def test_a_name_that_is_no_ustar_prefix_is_left_alone(tmp_path: Path) -> None:
    path = with_end(tmp_path / "t.tar", entry(b"", magic=b"ustar  \0", prefix=b"14000000000"))  # GNU: access time
    assert read(path) == [("a.png", b"")]


def test_a_hostile_size_of_an_extended_header_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with path.open("wb") as file:
        file.write(header(size=b"%011o\0" % (8**11 - 1), kind=b"L"))
        file.truncate(8**11 + 4096)
    tracemalloc.start()
    with pytest.raises(InvalidData, match="extended header of"):
        list(walk_members(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    names = st.text("ab./é" + "long" * 40, min_size=1, max_size=130).filter(
        lambda name: name.strip("./ ") != "" and name[-1] != "/"
    )
    members = draw(st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=5))
    format = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    return make_tar(members, format)


def require_error_or_the_members_of_tarfile(path: Path, archive: bytes) -> None:
    path.write_bytes(archive)
    try:
        found = read(path)
    except InvalidData as error:
        place = str(error)
    else:
        place = f"{path}: header at byte "
        with suppress(tarfile.ReadError):  # it reads modes, owners and times, too, which may be damaged
            assert found == members_of_tarfile(archive)
    assert place.startswith(f"{path}: header at byte ")


@settings(max_examples=50, deadline=None)
@given(archive=archives(), data=st.data())
def test_a_cut_archive_gives_an_error_or_what_tarfile_reads(
    tmp_path_factory: pytest.TempPathFactory, archive: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.tar"
    require_error_or_the_members_of_tarfile(path, archive[: data.draw(st.integers(0, len(archive)))])


@settings(max_examples=50, deadline=None)
@given(archive=archives(), data=st.data())
def test_flipped_bits_give_an_error_or_what_tarfile_reads(
    tmp_path_factory: pytest.TempPathFactory, archive: bytes, data: st.DataObject
) -> None:
    flipped = bytearray(archive)
    for bit in data.draw(st.lists(st.integers(0, 8 * 4096 - 1), max_size=4)):
        flipped[bit // 8 % len(archive)] ^= 1 << bit % 8
    require_error_or_the_members_of_tarfile(tmp_path_factory.getbasetemp() / "flipped.tar", bytes(flipped))


@settings(max_examples=50, deadline=None)
@given(blocks=st.lists(st.one_of(st.binary(max_size=600), st.just(header()), st.just(entry(b"abc"))), max_size=6))
def test_random_bytes_give_an_error_with_their_place(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.tar"
    path.write_bytes(b"".join(blocks))
    with pytest.raises(InvalidData, match=r"header at byte \d+"):
        list(walk_members(path))


@settings(max_examples=50, deadline=None)
@given(records=st.lists(st.text(" 0123456789=\npath", max_size=14).map(str.encode), max_size=4))
def test_any_text_in_a_pax_header_ends_in_an_error_or_what_tarfile_reads(
    tmp_path_factory: pytest.TempPathFactory, records: list[bytes]
) -> None:
    body = b"".join(records)
    with_comment = pax(comment="x") + body  # so that what follows is not at the beginning
    for content in (body, with_comment):
        path = with_end(tmp_path_factory.getbasetemp() / "pax.tar", entry(content, kind=b"x"), entry(b"abc"))
        try:
            found = read(path)
        except InvalidData:
            continue
        assert found == members_of_tarfile(path.read_bytes())
