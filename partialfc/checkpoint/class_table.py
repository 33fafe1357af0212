"""Class tables compared by identity name, so that class ids cannot shift unnoticed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from partialfc.data.writer import CLASSES
from partialfc.errors import ConfigError, DataError

__all__ = ["CLASSES", "check_class_table", "class_names"]


def class_names(table: Path) -> Iterator[str]:
    """Yield the identity names of a class table, in the order of the class ids.

    Raises:
        DataError: the table cannot be read, or a line is not a class with its ``id`` and ``name``.
    """
    try:
        with table.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                entry = json.loads(line)
                if not isinstance(entry, dict) or entry.get("id") != number or "name" not in entry:
                    raise DataError(f"{table}: line {number + 1} is not a class with 'id' {number} and a 'name'")
                yield str(entry["name"])
    except (OSError, ValueError) as error:
        raise DataError(f"{table} cannot be read: {error}") from error


def check_class_table(before: Path, now: Path, may_grow: bool) -> int:
    """Return the number of classes that ``now`` appends to the classes of ``before``.

    Raises:
        ConfigError: a class has changed its id or is missing, or there are new classes and ``may_grow`` is false.
        DataError: a table cannot be read.
    """
    new = 0
    for number, (old_name, name) in enumerate(zip_longest(class_names(before), class_names(now))):
        if old_name is None:
            new += 1
        elif name != old_name:
            found = f"is {name!r} now" if name is not None else "is missing now"
            raise ConfigError(
                f"class {number} was {old_name!r} when the checkpoint was written, and {found}"
                f"{_elsewhere(now, old_name)}. Trained rows belong to ids: {now} must list the classes of {before} "
                "first and in the same order, then the new ones"
            )
    if new and not may_grow:
        raise ConfigError(
            f"{now} has {new:,} more classes than the checkpoint; checkpoint.grow=true adds them, "
            "another run.dir starts a new run"
        )
    return new


def _elsewhere(table: Path, name: str) -> str:
    place = next((number for number, other in enumerate(class_names(table)) if other == name), None)
    return "" if place is None else f" (now id {place})"
