"""Lists of image pairs as benchmarks publish them: LFW, CFP, AgeDB, CALFW, CPLFW, and a CSV for any other.

========== ==================================================== ======================================================
set        its list                                             a pair
========== ==================================================== ======================================================
LFW        ``pairs.txt``, perhaps headed ``10 300``             ``name 1 2`` (same) or ``name 1 other 3``: image 1 is
                                                                ``name/name_0001.jpg``
CFP        folder ``Protocol/Split/FP`` (or ``FF``), in it      ``1,2``: line 1 of ``Pair_list_F.txt`` and line 2 of
           ``01/same.txt``, ``01/diff.txt`` … ``10/…``          ``Pair_list_P.txt`` (``FF``: of ``Pair_list_F.txt``)
AgeDB      a text file                                          ``first.jpg second.jpg 1`` (same) or ``… 0`` or ``… -1``
CALFW,     ``pairs_CALFW.txt``, ``pairs_CPLFW.txt``             two lines ``image.jpg 1``: 0 is different, any other
CPLFW                                                           number the same
any        CSV, headed ``first,second,same`` or with ``fold``   ``a/1.jpg,b/2.jpg,0``
========== ==================================================== ======================================================

Fields are separated by blanks, or by tabs where a line has any. The form of LFW is that of its README; those of the
others are what public loaders of these sets read.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from reprlib import repr as shortened

from partialfc.data.pairs import FOLDS, Pair, folds_in_order, parse_pairs
from partialfc.errors import InvalidData
from partialfc.files import open_regular, read_bounded

_MAX_BYTES = 1 << 28
_START = 1 << 16  # bytes from which a list is recognised
_CSV = b"first,second,same"

Fields = tuple[int, list[str]]  # number of a line, and its fields


def is_pair_list(path: Path) -> bool:
    """Return True if a file begins as a list of pairs, or a folder is a protocol of CFP.

    A text must also be named as one, such as ``pairs_CALFW.txt``: lines such as ``image.jpg 3`` may list anything.
    """
    if path.is_dir():
        return _is_cfp(path)
    try:
        with open_regular(path) as file:
            start = file.read(_START)
    except OSError:
        return False
    if _is_csv(start) or "pair" not in path.name.lower():
        return _is_csv(start)
    lines = start.decode("utf-8-sig", "replace").splitlines()[: 3 if len(start) < _START else 2]
    rows = [_split(line) for line in lines if line.strip()]
    rows = rows[1:] if rows and _is_header(rows[0]) else rows
    return bool(rows) and all(_kind_of(row) for row in rows)


def _is_cfp(folder: Path) -> bool:
    return (folder / "01" / "same.txt").is_file()  # any other way would walk through folders by the million


def _is_csv(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").replace(b" ", b"").startswith(_CSV)


def read_pair_list(path: Path) -> list[Pair]:
    """Return the pairs of a list, with the images' paths below a root, and with folds.

    A path of LFW's has no extension. Where the list says nothing about folds, its genuine pairs are divided into 10 in
    their order, and so are its impostor pairs: LFW's own folds, whether these follow one another or not.

    Raises:
        InvalidData: it cannot be read, or a line is not a pair; the message names the line.
    """
    if path.is_dir():
        if not _is_cfp(path):
            raise InvalidData(
                f"{path} is no list of pairs; of folders, only a protocol of CFP is: Protocol/Split/FP or FF"
            )
        pairs = list(_read_cfp(path.absolute()))
    else:
        try:
            content = read_bounded(path, _MAX_BYTES)
        except OSError as error:
            raise InvalidData(f"{path} cannot be read: {error.strerror}") from error
        pairs = list(parse_pairs(path)) if _is_csv(content) else _read_text(content, path)
    if not pairs:
        raise InvalidData(f"{path} lists no pairs")
    for pair in pairs:
        for name in (pair.first, pair.second):
            if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
                raise InvalidData(f"{path}: {shortened(name)} is not a path below the folder of the images")
    return pairs


# --- text -------------------------------------------------------------------------------------------------------------


def _read_text(content: bytes, path: Path) -> list[Pair]:
    rows = list(_rows(content, path))
    header = rows.pop(0)[1] if rows and _is_header(rows[0][1]) else []
    if rows and _kind_of(rows[0][1]) == "half":
        pairs = list(_join_halves(rows, path))
    else:
        pairs = [_parse(row, number, path) for number, row in rows]
    return _with_folds(pairs, [int(field) for field in header], path)


def _rows(content: bytes, path: Path) -> Iterator[Fields]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path}: byte {error.start} is not UTF-8; expected a list of pairs") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _split(line)


def _split(line: str) -> list[str]:
    return [field.strip() for field in line.strip().split("\t")] if "\t" in line.strip() else line.split()


def _is_header(row: Sequence[str]) -> bool:
    return len(row) <= 2 and all(field.isascii() and field.isdigit() and len(field) < 10 for field in row)


def _is_number(field: str) -> bool:
    return field.isascii() and field.removeprefix("-").isdigit() and len(field) < 10


def _kind_of(row: Sequence[str]) -> str:
    """Return the form of a line, ``""`` if it has none of them."""
    numbers = [_is_number(field) for field in row]
    if len(row) == 4 and numbers[1] and numbers[3]:
        return "different"
    if len(row) == 3 and numbers[1] and numbers[2]:
        return "same"
    if len(row) == 3 and row[2] in ("0", "1", "-1"):
        return "list"
    return "half" if len(row) == 2 and numbers[1] and not numbers[0] else ""


def _parse(row: list[str], number: int, path: Path) -> Pair:
    match _kind_of(row):
        case "different":
            return Pair(_image_of(row[0], row[1]), _image_of(row[2], row[3]), False)
        case "same":
            return Pair(_image_of(row[0], row[1]), _image_of(row[0], row[2]), True)
        case "list":
            return Pair(row[0], row[1], row[2] == "1")
    raise InvalidData(
        f"{path}: line {number} is not a pair such as `name 1 2`, `name 1 other 3` or `first.jpg second.jpg 1`: "
        f"{shortened(' '.join(row))}"
    )


def _image_of(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}"


def _join_halves(rows: list[Fields], path: Path) -> Iterator[Pair]:
    for number, row in rows:
        if _kind_of(row) != "half":
            raise InvalidData(
                f"{path}: line {number} is not `image.jpg 1` or `image.jpg 0`: {shortened(' '.join(row))}"
            )
    if len(rows) % 2:
        raise InvalidData(f"{path}: expected two lines a pair, got {len(rows):,} lines")
    for (number, first), (_, second) in zip(islice(rows, 0, None, 2), islice(rows, 1, None, 2), strict=True):
        if first[1] != second[1]:
            raise InvalidData(
                f"{path}: lines {number} and {number + 1} are a pair, and end in different numbers, {first[1]} and "
                f"{second[1]}"
            )
        yield Pair(first[0], second[0], int(first[1]) != 0)


def _with_folds(pairs: list[Pair], header: list[int], path: Path) -> list[Pair]:
    """Return the pairs with the folds of the header: their number, and the pairs of each kind in one."""
    counts = {same: sum(pair.same == same for pair in pairs) for same in (True, False)}
    folds, size = (header if len(header) == 2 else [FOLDS, *header, 0])[:2]
    expected = folds * size if len(header) == 2 else size
    if header and (set(counts.values()) != {expected} or folds > max(expected, 1)):
        raise InvalidData(
            f"{path}: its first line says {expected:,} pairs of each kind, and it has {counts[True]:,} of the same and "
            f"{counts[False]:,} of different people"
        )
    left = {same: iter(folds_in_order(count, folds).tolist()) for same, count in counts.items()}
    return [pair._replace(fold=next(left[pair.same])) for pair in pairs]


# --- CFP --------------------------------------------------------------------------------------------------------------


def _read_cfp(folder: Path) -> Iterator[Pair]:
    """Yield the pairs of a folder such as ``Protocol/Split/FP``; paths are relative to the folder of ``Protocol``."""
    first = _read_cfp_images(folder.parents[1] / "Pair_list_F.txt")
    second = _read_cfp_images(folder.parents[1] / "Pair_list_P.txt") if folder.name == "FP" else first
    for fold, part in enumerate(sorted(path.parent for path in folder.glob("*/same.txt"))):
        for name, same in (("same.txt", True), ("diff.txt", False)):
            path = part / name
            for number, row in _rows(_content(path), path):
                fields = "".join(row).split(",")
                if len(fields) != 2 or not all(map(_is_number, fields)):
                    raise InvalidData(f"{path}: line {number} is not two numbers `1,2`: {shortened(' '.join(row))}")
                places = int(fields[0]), int(fields[1])
                for place, images in zip(places, (first, second), strict=True):
                    if place not in images:
                        raise InvalidData(f"{path}: line {number}: there is no image {place} in the list of images")
                yield Pair(first[places[0]], second[places[1]], same, fold)


def _read_cfp_images(path: Path) -> dict[int, str]:
    found = {}
    for number, row in _rows(_content(path), path):
        if len(row) != 2 or not _is_number(row[0]):
            raise InvalidData(f"{path}: line {number} is not `1 ../Data/Images/…`: {shortened(' '.join(row))}")
        found[int(row[0])] = posixpath.normpath(posixpath.join(path.parent.name, row[1]))
    return found


def _content(path: Path) -> bytes:
    try:
        return read_bounded(path, _MAX_BYTES)
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error.strerror}") from error
