"""``pairs.csv`` of a verification set: two samples a line, whether they show the same class, and the pair's fold."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from partialfc.data.text_lines import text_lines
from partialfc.errors import InvalidData
from partialfc.files import open_regular, write_atomically
from partialfc.options import describe_unknown

PAIRS = "pairs.csv"
FOLDS = 10  # of LFW's protocol

_COLUMNS = ("first", "second", "same", "fold")
_SAME = {"1": True, "0": False, "true": True, "false": False}
_MAX_LINE_BYTES = 1 << 13
_MAX_PAIRS = 100_000_000
_MAX_FOLD = 1 << 15


class Pair(NamedTuple):
    """A line of a list of pairs."""

    first: str
    second: str
    same: bool
    fold: int | None = None


@dataclass(frozen=True)
class PairList:
    """The pairs of a verification set, by the numbers of its samples.

    Attributes:
        first, second: int64 [pairs], sample numbers.
        same: bool [pairs], True for a genuine pair.
        folds: int64 [pairs], counted from 0 without gaps.
    """

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    same: npt.NDArray[np.bool_]
    folds: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first)


def folds_in_order(pairs: int, folds: int = FOLDS) -> npt.NDArray[np.int64]:
    """Return the folds of pairs that have none of their own: contiguous parts, of which the first are larger by one.

    These are the folds of scikit-learn's ``KFold(folds)``, and so those of InsightFace.
    """
    size, larger = divmod(pairs, folds)
    return np.repeat(np.arange(folds), [size + (fold < larger) for fold in range(folds)])


def write_pairs(folder: Path, pairs: Iterable[Pair]) -> None:
    """Write ``pairs.csv`` into a folder; the pairs name samples by their keys."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows((pair.first, pair.second, int(pair.same), pair.fold) for pair in pairs)
    write_atomically(folder / PAIRS, text.getvalue())


def parse_pairs(path: Path) -> Iterator[Pair]:
    """Yield the pairs of a CSV file with a header: ``first``, ``second``, ``same`` (1 or 0), and perhaps ``fold``.

    Raises:
        InvalidData: it cannot be read, or a line is not a pair; the message names the line.
    """
    try:
        with open_regular(path) as file:
            rows = csv.reader(text_lines(file, path, _MAX_LINE_BYTES), strict=True)
            header = [name.strip() for name in next(rows, [])]
            columns = _find_columns(header, path)
            for row in rows:
                if not row:
                    continue
                if rows.line_num > _MAX_PAIRS:
                    raise InvalidData(f"{path} has more than {_MAX_PAIRS:,} lines")
                if len(row) != len(header):
                    raise InvalidData(
                        f"{path}: line {rows.line_num} has {len(row)} columns, and {len(header)} in the header"
                    )
                yield _parse_row([row[column] for column in columns], f"{path}: line {rows.line_num}")
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise InvalidData(f"{path}: line {rows.line_num} is not CSV: {error}") from error


def _find_columns(header: Sequence[str], path: Path) -> list[int]:
    for name in header:
        if name not in _COLUMNS:
            raise InvalidData(f"{path}, header: {describe_unknown(name, _COLUMNS)}")
    lacking = [name for name in _COLUMNS[:3] if name not in header]
    if lacking or len(set(header)) < len(header):
        problem = f"there is no column {lacking[0]!r}" if lacking else "a column is named twice"
        raise InvalidData(f"{path}: {problem}; expected the header first,second,same,fold")
    return [header.index(name) for name in _COLUMNS if name in header]


def _parse_row(values: Sequence[str], where: str) -> Pair:
    first, second, same = values[:3]
    if same.strip().lower() not in _SAME:
        raise InvalidData(f"{where}: 'same' must be 1 or 0, got {shortened(same)}")
    fold = values[3].strip() if len(values) > 3 else None
    if fold is not None and not (fold.isascii() and fold.isdigit() and int(fold[:9]) < _MAX_FOLD):
        raise InvalidData(f"{where}: 'fold' must be a number from 0 to {_MAX_FOLD - 1}, got {shortened(fold)}")
    return Pair(first, second, _SAME[same.strip().lower()], None if fold is None else int(fold))


def read_pairs(folder: Path, keys: Sequence[str]) -> PairList:
    """Return the pairs of a verification set.

    Args:
        keys: of the set's samples.

    Raises:
        InvalidData: ``pairs.csv`` is malformed or names an unknown sample, or there is no genuine or no impostor pair.
    """
    path = folder / PAIRS
    numbers = {key: number for number, key in enumerate(keys)}
    if len(numbers) < len(keys):
        twice = next(key for number, key in enumerate(keys) if numbers[key] != number)
        raise InvalidData(f"{folder}: two samples have the key {twice!r}, so that {PAIRS} cannot tell them apart")
    first, second, same, folds = list[int](), list[int](), list[bool](), list[int]()
    for number, pair in enumerate(parse_pairs(path), start=1):
        for key in (pair.first, pair.second):
            if key not in numbers:
                raise InvalidData(f"{path}: pair {number}: no sample has the key {shortened(key)}")
        first.append(numbers[pair.first])
        second.append(numbers[pair.second])
        same.append(pair.same)
        if pair.fold is not None:
            folds.append(pair.fold)
    for kind, count in (("genuine pairs (same 1)", sum(same)), ("impostor pairs (same 0)", len(same) - sum(same))):
        if not count:
            raise InvalidData(f"{path} has no {kind}; nothing can be measured")
    return PairList(
        np.array(first, dtype=np.int64),
        np.array(second, dtype=np.int64),
        np.array(same, dtype=np.bool_),
        np.unique(folds, return_inverse=True)[1].astype(np.int64) if folds else folds_in_order(len(first)),
    )
