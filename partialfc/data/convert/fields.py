"""Columns of a table of images: which one holds what, and what its values mean as identities and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import NamedTuple

from partialfc.data.convert.source import Skipped
from partialfc.errors import InvalidData

PATH_FIELDS = ("path", "file", "image", "filename", "file_name", "image_path", "file_path")
BYTES_FIELDS = ("bytes", "image_bytes", "base64")
LABEL_FIELDS = ("identity", "label", "class", "name")


NO_IMAGE = Skipped("row without an image")
NO_IDENTITY = Skipped("row without an identity")


class Columns(NamedTuple):
    """Names of the columns of a table that are taken; without one of keys, these are made."""

    image: str
    label: str
    key: str | None


@dataclass(frozen=True)
class Fields:
    """Names of the columns to take; None takes the only one that has a usual name.

    Attributes:
        image: path of the image, or its bytes.
        label: name or number of its identity.
        key: of its sample; None makes keys from paths or places.
    """

    image: str | None = None
    label: str | None = None
    key: str | None = None

    def resolve(self, columns: Sequence[str], where: str) -> Columns:
        """Return those of a table's ``columns`` that are taken.

        Args:
            where: the table, for messages.

        Raises:
            InvalidData: a column is missing, or several could be meant.
        """
        return Columns(
            _choose(columns, self.image, (*PATH_FIELDS, *BYTES_FIELDS), "image", where),
            _choose(columns, self.label, LABEL_FIELDS, "label", where),
            None if self.key is None else _choose(columns, self.key, (), "key", where),
        )


def _choose(columns: Sequence[str], wanted: str | None, usual: Sequence[str], what: str, where: str) -> str:
    if wanted is None:
        found = [column for column in columns if column.strip().lower() in usual]
        expected = f"a column {', '.join(usual[:-1])} or {usual[-1]}"
    else:
        found = [column for column in columns if column == wanted]
        expected = f"a column {wanted!r}"
    if len(found) != 1:
        have = ", ".join(map(repr, (found or columns)[:20]))[:500] or "none"
        problem = "several could be meant" if found else f"{expected} was expected"
        raise InvalidData(f"{where}: {problem}, there are {have}; name the right one with --{what}-field")
    return found[0]


def identity_text(value: object) -> str | None:
    """Return the identity that a value names, a whole number in decimal; None if there is none.

    Raises:
        ValueError: it is neither a text nor a whole number, or the text is no valid Unicode.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value.encode()  # JSON can write halves of UTF-16 pairs, which no other file can
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"an identity or key must be a text or a whole number, got {shortened(value)}")


def require_key(value: object) -> str:
    """Return the key that a value of the column of keys names.

    Raises:
        ValueError: it is empty, or as :func:`identity_text`.
    """
    key = identity_text(value)
    if key is None:
        raise ValueError("the key is empty")
    return key
