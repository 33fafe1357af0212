"""Checks of names and values in a config or a command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from partialfc.errors import ConfigError


def describe_unknown(name: str, known: Iterable[str]) -> str:
    """Return a message about a name that is not ``known``: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown name {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}")


def convert_like(where: str, value: Any, default: Any) -> Any:
    """Return ``value`` converted to the type of ``default``: bool, str, int or float; None stays None.

    Args:
        where: config key, for the message.

    Raises:
        ConfigError: the value has the wrong type.
    """
    for kind, expected in ((bool, "true or false"), (str, "a string")):
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
