"""Checks of names and values in a config or a command."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from partialfc.errors import ConfigError


def describe_unknown(name: str, known: Iterable[str]) -> str:
    """Return a message about a name that is not ``known``: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown name {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}")


def shorten(value: Any) -> str:
    """Return a value as Python writes it, cut for a message."""
    written = repr(value)
    return written if len(written) <= 100 else f"{written[:80]}… ({len(written):,} characters)"


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
                raise ConfigError(f"{where}: expected {expected}, got {shorten(value)}")
            return value
    if value is None and default is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # older configs hold 1e2 as a text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where}: expected a number, got {shorten(value)}")
    return int(number) if isinstance(default, int) and number.is_integer() else number


def with_defaults(factory: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords that ``factory`` is called with: its defaults, and ``given`` in their types.

    A value of another type, or one that the factory does not take, is returned as it is.
    """
    parameters = inspect.signature(factory).parameters
    defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    complete = defaults | dict(given)
    for name in defaults.keys() & given.keys():
        with suppress(ConfigError):
            complete[name] = convert_like(name, given[name], defaults[name])
    return complete
