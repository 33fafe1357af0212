"""Names and values that people write into a config, for things that take parameters of their own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from partialfc.errors import ConfigError


def unknown_name(name: str, known: Iterable[str]) -> str:
    """What to say of a name that there is not."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown name {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}")


def like_default(where: str, value: Any, default: Any) -> Any:
    """``value`` in the type that a parameter with this default takes.

    Raises:
        ConfigError: it is of another type.
    """
    for kind, expected in ((bool, "true or false"), (str, "a text")):
        if isinstance(default, kind):
            if not isinstance(value, kind):
                raise ConfigError(f"{where}: expected {expected}, got {value!r}")
            return value
    if value is None and default is None:
        return None
    try:
        number = float(value) if not isinstance(value, bool) else None  # YAML reads 1e2 as a string
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise ConfigError(f"{where}: expected a number, got {value!r}")
    return int(number) if isinstance(default, int) and number.is_integer() else number
