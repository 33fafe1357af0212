"""Tar archives of samples: deterministic headers when writing, a careful walk over headers when reading.

A shard is an uncompressed ustar archive in the WebDataset convention: the members of a sample follow each other and
share the part of their name before the first dot (the key): ``<key>.png`` and ``<key>.cls``, the class id in decimal.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from partialfc.errors import DataError, InvalidData
from partialfc.files import open_regular

BLOCK = 512
MAX_NAME_BYTES = 256  # of a member: a prefix of 155, a slash, a name of 100
END_OF_ARCHIVE = bytes(2 * BLOCK)
IMAGE_EXTENSIONS = ("png", "jpg", "webp")
_MAX_LABEL_BYTES = 20
_REGULAR, _DIRECTORY = (b"0", b"\0"), b"5"


def ustar_header(name: str, size: int) -> bytes:
    """Return the 512-byte header of a regular file: mode 0644, no owner or time, so equal content gives equal bytes."""
    encoded = name.encode()
    if not 0 < len(encoded) <= 100:
        raise DataError(f"member name must have 1..100 bytes in UTF-8, got {len(encoded)}: {name!r}")
    if not 0 <= size < 8**11:
        raise DataError(f"member {name!r} has {size} bytes; ustar members must be smaller than 8 GiB")
    header = bytearray(BLOCK)
    header[0 : len(encoded)] = encoded
    header[100:108] = b"0000644\0"
    header[108:124] = b"0000000\0" * 2  # uid, gid
    header[124:136] = b"%011o\0" % size
    header[136:148] = b"%011o\0" % 0  # mtime
    header[148:156] = b" " * 8  # the checksum counts itself as spaces
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def padding(size: int) -> bytes:
    """Return the zeros that pad a member of ``size`` bytes to a whole block."""
    return bytes(-size % BLOCK)


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str
    offset: int  # of the content, from the start of the file
    size: int


@dataclass(frozen=True, slots=True)
class Sample:
    """An image and its class in a shard."""

    key: str
    label: int
    offset: int  # of the image
    size: int


def walk_members(path: Path) -> Iterator[Member]:
    """Yield the regular members of a tar, by seeking from header to header; nothing in the archive is trusted.

    Raises:
        OSError: the file cannot be read.
        InvalidData: the archive is damaged or truncated, or holds links, devices, extended headers or names that lead
            out of it.
    """
    with open_regular(path) as file:
        end, position = os.fstat(file.fileno()).st_size, 0
        while position < end:
            file.seek(position)
            header = file.read(BLOCK)
            if header == bytes(len(header)) and header:
                return
            if len(header) < BLOCK:
                raise InvalidData(f"{path}: truncated: the header at byte {position} is cut off")
            member = _parse_header(header, position, path)
            position = member.offset + member.size + -member.size % BLOCK
            if member.offset + member.size > end:
                raise InvalidData(
                    f"{path}: truncated: member {member.name!r} reaches to byte {member.offset + member.size}, "
                    f"the file ends at {end}"
                )
            if header[156:157] in _REGULAR:
                yield member


def _parse_header(header: bytes, position: int, path: Path) -> Member:
    where = f"{path}: header at byte {position}"
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        size = int(header[124:136].strip(b" \0") or b"0", 8)
        name = header[0:100].split(b"\0", 1)[0].decode()
        prefix = header[345:500].split(b"\0", 1)[0].decode() if header[257:263] == b"ustar\0" else ""
    except ValueError as error:
        raise InvalidData(f"{where}: not a tar header ({error})") from error
    if checksum != sum(header) - sum(header[148:156]) + 8 * 32 or size < 0:
        raise InvalidData(f"{where}: the checksum does not match; the file is damaged or not a tar archive")
    if prefix:
        name = f"{prefix}/{name}"
    if header[156:157] not in (*_REGULAR, _DIRECTORY):
        raise InvalidData(
            f"{where}: member {name!r} is of type {header[156:157]!r}; only regular files are accepted "
            "(no links, devices or extended headers: write the archive as plain ustar)"
        )
    if name.startswith("/") or ".." in name.split("/") or not name:
        raise InvalidData(f"{where}: member name {name!r} leads out of the archive")
    return Member(name, position + BLOCK, size)


def walk_samples(path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard: consecutive members with one key, among them an image and a label.

    Raises:
        InvalidData: a sample lacks its image or label, or as :func:`walk_members`.
    """
    with open_regular(path) as file:
        key, members = "", dict[str, Member]()
        for member in walk_members(path):
            folder, name = posixpath.split(member.name)
            stem, _, extension = name.partition(".")
            if posixpath.join(folder, stem) != key:
                if members:
                    yield _sample(key, members, file, path)
                key, members = posixpath.join(folder, stem), {}
            if extension.lower() in members:
                raise InvalidData(f"{path}: sample {key!r} has two members .{extension}")
            members[extension.lower()] = member
        if members:
            yield _sample(key, members, file, path)


def _sample(key: str, members: dict[str, Member], file: BinaryIO, path: Path) -> Sample:
    images = [members[extension] for extension in (*IMAGE_EXTENSIONS, "jpeg") if extension in members]
    if len(images) != 1 or "cls" not in members:
        raise InvalidData(
            f"{path}: sample {key!r} needs one image ({', '.join(IMAGE_EXTENSIONS)}) and one .cls with its class id, "
            f"directly after one another; it has {', '.join('.' + extension for extension in members)}"
        )
    label = members["cls"]
    file.seek(label.offset)
    text = file.read(min(label.size, _MAX_LABEL_BYTES))
    # Decimal digits only: int() would also take "1_0", " 1" or other alphabets' digits.
    if label.size > _MAX_LABEL_BYTES or not text.strip().isdigit():
        raise InvalidData(f"{path}: label of sample {key!r} must be a class id in decimal, got {text!r}")
    return Sample(key, int(text), images[0].offset, images[0].size)
