"""InsightFace's verification sets ``lfw.bin``, ``cfp_fp.bin`` …: a pickle of encoded images and of "same" flags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from partialfc.data.convert.pickled import Array, Refusal, describe, unpickle
from partialfc.errors import InvalidData
from partialfc.files import read_bounded

_MAX_BYTES = 4 << 30


def read_pair_bin(path: Path) -> tuple[list[bytes], list[bool]]:
    """Return the encoded images, 2 a pair, and whether the images of each pair show the same identity.

    Images 2i and 2i + 1 form pair i. Equal entries of the list may be one object.

    Raises:
        InvalidData: it cannot be read, or is not such a file; the message says which name a hostile one asks for.
    """
    try:
        content = read_bounded(path, _MAX_BYTES)
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error.strerror}") from error
    try:
        found = unpickle(content)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise Refusal(f"expected a pair (images, same), got {describe(found)}")
        images, same = list(_images(_elements(found[0], "images"))), list(_flags(found[1]))
    except Refusal as error:
        raise InvalidData(f"{path} is not a verification set of InsightFace: {error}") from error
    if len(images) != 2 * len(same) or not same:
        raise InvalidData(f"{path}: expected 2 images a pair, got {len(images):,} images and {len(same):,} pairs")
    return images, same


def _elements(value: Any, what: str) -> Sequence[Any]:
    found = value.data if isinstance(value, Array) and value.kind == "O8" else value
    if not isinstance(found, list | tuple):
        raise Refusal(f"expected a list of {what}, got {describe(value)}")
    return found


def _images(values: Sequence[Any]) -> Iterator[bytes]:
    for number, value in enumerate(values):
        found = value.data if isinstance(value, Array) and value.kind in ("u1", "i1") else value
        if not isinstance(found, bytes) or not found:
            raise Refusal(f"image {number} is {describe(value)}, not encoded bytes")
        yield found


def _flags(value: Any) -> Iterator[bool]:
    if isinstance(value, Array) and isinstance(value.data, bytes):
        yield from _bools(value)
        return
    for flag in _elements(value, "flags"):
        found = _bools(flag) if isinstance(flag, Array) else [flag]
        if len(found) != 1 or not isinstance(found[0], int) or found[0] not in (0, 1):
            raise Refusal(f"a flag is {describe(flag)}, not True or False")
        yield bool(found[0])


def _bools(value: Array) -> list[bool]:
    """Return the elements of an array of truth values or integers, little-endian."""
    size = {"b1": 1, "u1": 1, "i1": 1, "i4": 4, "i8": 8}.get(value.kind)
    if size is None or not isinstance(value.data, bytes):
        raise Refusal(f"flags are {describe(value)}, not truth values")
    numbers = [int.from_bytes(value.data[at : at + size], "little") for at in range(0, len(value.data), size)]
    if any(number > 1 for number in numbers):
        raise Refusal("a flag is neither 0 nor 1")
    return [number == 1 for number in numbers]
