"""What the pipeline needs of a source: its records, listed once in parts, then read in any order by any process."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

MAX_KEY_BYTES = 95  # with an extension, it fits into the name field of a tar header
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")  # of files that count as images
MAX_SIZE = (1 << 32) - 1  # of a record

_CONTROLS = re.compile(r"[%\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Record:
    """An image in a source, before it is read.

    Attributes:
        key: of its sample; made by :func:`sample_key` unless the source has keys of its own.
        identity: name of its class in the source.
        path: of its file, relative to the source, where each record is a file; else empty.
        file: number of the file that holds it, in the source's own order.
        offset: place in that file, as the source counts: a byte, a row group.
        size: the rest of the place: bytes, a row of the group.
    """

    key: str
    identity: str
    path: str = ""
    file: int = 0  # below 2**32
    offset: int = 0  # below 2**63
    size: int = 0  # up to MAX_SIZE


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The place of a record whose image cannot be used."""

    reason: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something in a source that is no record. How often each reason occurs is reported, once for the whole source."""

    reason: str


class Source(Protocol):
    """A place that images come from. It is pickled to other processes, and opens its files where it is used.

    Attributes:
        kind: name of the format, recorded in ``index.json``.
        in_blocks: records of equal (``file``, ``offset``) are read together; the shuffle then moves whole blocks.
    """

    kind: str
    in_blocks: bool

    def fingerprint(self) -> Any:
        """Return a JSON value that changes when the source does: names, sizes and times of its files, options.

        Raises:
            DataError: the source is missing, empty, or not what it says.
        """

    def parts(self) -> Sequence[Any]:
        """Return the parts that can be listed independently of each other, in a fixed order: files, folders, ranges."""

    def num_records(self) -> int | None:
        """Return the number of records that the source says it has, if it does; a warning tells if there are others."""
        return None

    def num_identities(self) -> int | None:
        """Return the number of identities that the source says it has, likewise."""
        return None

    def list_part(self, part: Any) -> Iterator[Record | Skipped]:
        """Yield the records of a part, always in the same order, and what was left out.

        Raises:
            InvalidData: the part is damaged; the message names file and offset.
        """

    def read(self, records: Sequence[Record]) -> Iterator[bytes | Unreadable]:
        """Yield the encoded image of each record, in their order, which is a shuffled one; they come without identity.

        Where ``in_blocks`` is set, records of a block follow each other.

        Memory stays bounded by the largest record, whatever their number.

        Raises:
            DataUnavailable: a file cannot be read.
        """


def sample_key(path: str) -> str:
    """Return the key of a sample from its relative path without extension: unique if the path is, and valid in a tar.

    Folders stay. Dots of the name, percent signs and control characters become ``%2E`` and so on; a key too long for a
    tar header ends in 16 digits of its SHA-256.
    """
    *folders, name = [_CONTROLS.sub(_percent, part) for part in path.split("/") if part]
    # A folder may contain dots, but not consist of them: no reader would take "../a".
    folders = [folder if folder.strip(".") else folder.replace(".", "%2E") for folder in folders]
    key = "/".join([*folders, name.replace(".", "%2E")])
    return fit_key(key)


def fit_key(key: str) -> str:
    """Return a key as it is, or if it is too long for a tar header, its beginning and 16 digits of its SHA-256."""
    encoded = key.encode()
    if len(encoded) <= MAX_KEY_BYTES:
        return key
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    # What is left may end within a folder, whose dots would end the key.
    begin = encoded[: MAX_KEY_BYTES - 17].decode(errors="ignore").replace("/", "_").replace(".", "_")
    return f"{begin}~{digest}"


def _percent(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogatepass"))
