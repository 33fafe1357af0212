"""Class tables compared by identity name, so that class ids cannot shift unnoticed."""

from __future__ import annotations

import filecmp
from itertools import zip_longest
from pathlib import Path

from partialfc.data.class_table import class_names
from partialfc.errors import ConfigError


def check_class_table(before: Path, now: Path, may_grow: bool) -> int:
    """Return the number of classes that ``now`` appends to the classes of ``before``.

    Tables of equal bytes are not parsed.

    Raises:
        ConfigError: a class has changed its id or is missing, or there are new classes and ``may_grow`` is false.
        InvalidData: a table cannot be read.
    """
    if _are_equal_files(before, now):
        return 0
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


def _are_equal_files(before: Path, now: Path) -> bool:
    try:
        return filecmp.cmp(before, now, shallow=False)
    except OSError:  # said better by who parses them
        return False


def _elsewhere(table: Path, name: str) -> str:
    place = next((number for number, other in enumerate(class_names(table)) if other == name), None)
    return "" if place is None else f" (now id {place})"
