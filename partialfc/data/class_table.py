"""``classes.jsonl``: one object a line with ``id``, counted from 0, and ``name``, the identity in the data's source."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from partialfc.errors import InvalidData
from partialfc.files import open_regular

_MAX_LINE_BYTES = 1 << 16


def read_classes(table: Path) -> Iterator[dict[str, Any]]:
    """Yield the classes of a table, in the order of their ids. Ten million take about half a minute.

    Raises:
        InvalidData: the table cannot be read, or a line is not a class with its ``id`` and ``name``.
    """
    decode = json.JSONDecoder().raw_decode  # json.loads takes twice as long for a line
    number = 0
    try:
        with open_regular(table) as file:
            while line := file.readline(_MAX_LINE_BYTES + 1):
                if len(line) > _MAX_LINE_BYTES:
                    raise InvalidData(f"{table}: line {number + 1} is longer than {_MAX_LINE_BYTES:,} bytes")
                text = line.decode().strip()
                entry, end = decode(text)
                if end < len(text):
                    raise ValueError("there is more after it")
                if not _is_class(entry, number):
                    found = f", got 'id' {entry.get('id')!r}" if isinstance(entry, dict) and "name" in entry else ""
                    raise InvalidData(
                        f"{table}: line {number + 1} is not a class with 'id' {number} and a 'name'{found}"
                        + ("; classes are listed in the order of their ids" if found else "")
                    )
                yield entry
                number += 1
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InvalidData(f"{table}: line {number + 1} is not JSON: {reason}") from error
    except OSError as error:
        raise InvalidData(f"{table} cannot be read: {error.strerror}") from error


def class_line(entry: Mapping[str, Any]) -> bytes:
    """Return a class as a line of a table."""
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _is_class(entry: Any, number: int) -> bool:
    return isinstance(entry, dict) and "name" in entry and type(entry.get("id")) is int and entry["id"] == number


def class_names(table: Path) -> Iterator[str]:
    """Return the identity names of a class table, in the order of the class ids; raises as :func:`read_classes`."""
    return (str(entry["name"]) for entry in read_classes(table))


def require_class_table(table: Path, num_classes: int) -> None:
    """Read a class table to its end.

    Raises:
        InvalidData: it is missing or damaged, or has another number of classes than ``num_classes``.
    """
    _require_count(table, sum(1 for _ in islice(read_classes(table), num_classes + 1)), num_classes)


def _require_count(table: Path, found: int, num_classes: int) -> None:
    if found != num_classes:
        more = f"more than {num_classes:,}" if found > num_classes else f"only {found:,}"
        raise InvalidData(f"{table}: expected {num_classes:,} classes, one a line; it has {more}")


def match_classes(table: Path, trained: Path, num_classes: int) -> npt.NDArray[np.int64]:
    """Return the id that each of a table's ``num_classes`` classes has in another table, int64 [num_classes].

    Raises:
        InvalidData: a table is damaged, a class is not in ``trained``, or a name stands for two classes.
    """
    names = list(islice(class_names(table), num_classes + 1))
    _require_count(table, len(names), num_classes)
    if names == list(islice(class_names(trained), num_classes)):
        return np.arange(num_classes, dtype=np.int64)
    places: dict[str, int] = {}
    for number, name in enumerate(names):
        if places.setdefault(name, number) != number:
            raise InvalidData(f"{table}: classes {places[name]} and {number} are both called {name!r}")
    ids = np.full(num_classes, -1, dtype=np.int64)
    for number, name in enumerate(class_names(trained)):
        place = places.get(name)
        if place is not None and ids[place] >= 0:
            raise InvalidData(f"{trained}: classes {ids[place]} and {number} are both called {name!r}")
        if place is not None:
            ids[place] = number
    unknown = np.flatnonzero(ids < 0).tolist()
    if unknown:
        raise InvalidData(
            f"{table}: {len(unknown):,} of {num_classes:,} classes are not in {trained}, the first is class "
            f"{unknown[0]}, {names[unknown[0]]!r}"
        )
    return ids
