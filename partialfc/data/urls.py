"""Names of many files in one text: braces as in ``train-{000000..000123}.tar`` and ``{a,b}.tar``, joined by ``::``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from partialfc.errors import ConfigError
from partialfc.options import shorten

_MAX_NAMES = 1_000_000
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:(?!:)")


def is_pattern(text: str) -> bool:
    """Return True if a text stands for several names, rather than being one."""
    return "{" in text or "::" in text


def expand(text: str) -> list[str]:
    """Return the names that a text stands for, in its order: ``a-{8..10}.tar::b.tar`` gives four.

    A range is as long as its numbers are written: ``{08..10}`` gives 08, 09, 10. Braces may be nested.

    Raises:
        ConfigError: braces do not match or hold neither list nor range, there are too many names, or one is a URL.
    """
    try:
        names = [name for part in text.split("::") for name in _bounded(_expand(part, text), text)]
    except RecursionError:
        raise ConfigError(f"{shorten(text)}: too many braces") from None
    for name in names:
        if not name:
            raise ConfigError(f"{text}: a name between '::' is empty")
        if _URL.match(name):
            raise ConfigError(f"{name}: only local files are read; copy the shards to a disk, or mount their storage")
    return _bounded(names, text)


def _expand(part: str, text: str) -> Iterable[str]:
    start = part.find("{")
    if start < 0:
        if "}" in part:
            raise ConfigError(f"{text}: '}}' without '{{'")
        return [part]
    stop = _closing(part, start)
    if stop is None:
        raise ConfigError(f"{text}: '{{' without '}}'")
    choices = _choices(part[start + 1 : stop], text)
    ends = _bounded(_expand(part[stop + 1 :], text), text)
    return (part[:start] + choice + end for choice in choices for end in ends)


def _choices(inner: str, text: str) -> Iterable[str]:
    """Return what the braces around ``inner`` stand for."""
    if found := _RANGE.fullmatch(inner):
        first, last = int(found[1]), int(found[2])
        if last < first or last - first >= _MAX_NAMES:
            raise ConfigError(f"{text}: the range {{{inner}}} is not rising, or has more than {_MAX_NAMES:,} numbers")
        width = max(map(len, found.groups())) if any(number[0] == "0" for number in found.groups()) else 0
        return [str(number).zfill(width) for number in range(first, last + 1)]
    alternatives = _split(inner)
    if len(alternatives) < 2:
        raise ConfigError(f"{text}: expected a range such as {{0..9}} or a list such as {{a,b}}, got {{{inner}}}")
    return [name for alternative in alternatives for name in _expand(alternative, text)]


def _closing(part: str, start: int) -> int | None:
    """Return the place of the brace that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(part)):
        depth += {"{": 1, "}": -1}.get(part[place], 0)
        if depth == 0:
            return place
    return None


def _split(inner: str) -> list[str]:
    """Split at the commas outside of inner braces."""
    parts, depth = [""], 0
    for sign in inner:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _bounded(names: Iterable[str], text: str) -> list[str]:
    found = []
    for name in names:
        found.append(name)
        if len(found) > _MAX_NAMES:
            raise ConfigError(f"{text}: stands for more than {_MAX_NAMES:,} names")
    return found
