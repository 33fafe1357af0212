"""Cleaning lists: CSV files that name what to leave out of a source, and which of its identities are one."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from partialfc.data.text_lines import text_lines
from partialfc.errors import InvalidData
from partialfc.files import open_regular

_MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True)
class Exclusions:
    """Samples to leave out, by their keys or by their identities."""

    keys: frozenset[str] = frozenset()
    identities: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Merges:
    """Identities that count as another one: ``into[name]``, at the end of a chain.

    Attributes:
        named: all that the list names.
    """

    into: dict[str, str] = field(default_factory=dict)
    named: frozenset[str] = frozenset()


def read_exclusions(path: Path) -> Exclusions:
    """Read a list with a column ``key`` or ``identity``; where it has both, the key says which sample is meant.

    Raises:
        InvalidData: it cannot be read, has neither column, or a row has no value.
    """
    columns, rows = _read(path, ("key",), ("identity",))
    values = frozenset(value for (value,) in rows)
    return Exclusions(keys=values) if columns == ("key",) else Exclusions(identities=values)


def read_merges(path: Path) -> Merges:
    """Read a list with the columns ``identity`` and ``into``, and follow chains: a into b, b into c.

    Raises:
        InvalidData: it cannot be read, lacks a column or a value, gives two targets for a name, or goes in a circle.
    """
    into = dict[str, str]()
    for name, target in _read(path, ("identity", "into"))[1]:
        if into.setdefault(name, target) != target:
            raise InvalidData(f"{path}: {name!r} is to go into {into[name]!r} and into {target!r}")
    into = {name: target for name, target in into.items() if name != target}
    named = frozenset(into) | frozenset(into.values())
    for name in into:
        chain = [name]
        while chain[-1] in into:
            chain.append(into[chain[-1]])
            if len(chain) > len(into) + 1:
                raise InvalidData(f"{path}: {name!r} comes back to itself or to another that does")
        into.update(dict.fromkeys(chain[:-1], chain[-1]))
    return Merges(into, named)


def _read(path: Path, *choices: tuple[str, ...]) -> tuple[tuple[str, ...], Iterator[tuple[str, ...]]]:
    """Return the first of these choices of columns that a CSV file has, and its rows of them, without empty values."""
    rows = _rows(path)
    found = next(rows, [])
    for columns in choices:
        if set(columns) <= set(found):
            return columns, _pick(path, rows, found, columns)
    wanted = " or ".join(" and ".join(columns) for columns in choices)
    raise InvalidData(f"{path}: expected the column{'s' * (len(choices[0]) > 1)} {wanted}, got {', '.join(found):.200}")


def _pick(
    path: Path, rows: Iterator[list[str]], found: list[str], columns: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    places = [found.index(column) for column in columns]
    for number, row in enumerate(rows, start=1):
        values = tuple(row[place] for place in places) if len(row) == len(found) else ()
        if not values or not all(values):
            raise InvalidData(f"{path}: row {number}: expected {', '.join(found)}, got {','.join(row)!r:.200}")
        yield values


def _rows(path: Path) -> Iterator[list[str]]:
    try:
        with open_regular(path) as file:
            yield from filter(None, csv.reader(text_lines(file, path, _MAX_LINE_BYTES), strict=True))
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise InvalidData(f"{path} is not a CSV file: {error}") from error
