"""Lines of the tables that people write: in UTF-8, with or without a byte order mark, each of bounded length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from partialfc.errors import InvalidData


def text_lines(file: BinaryIO, path: Path, limit: int) -> Iterator[str]:
    """Yield the lines of a file, with their ends.

    Args:
        path: of the file, for messages.
        limit: bytes that a line may have.

    Raises:
        InvalidData: a line is longer, or is not UTF-8; the message names it.
        OSError: the file cannot be read.
    """
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise InvalidData(f"{path}: line {number} is longer than {limit:,} bytes")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InvalidData(f"{path}: line {number} is not UTF-8") from error
