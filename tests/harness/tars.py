"""Tar archives as other tools write them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

Content = tuple[str, bytes]  # name and bytes of a member


def make_tar(
    members: Iterable[Content | tarfile.TarInfo], format: int = tarfile.USTAR_FORMAT, **options: object
) -> bytes:
    """The archive of members that ``tarfile`` writes; a TarInfo stands for a member without content."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=format, **options) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return archive.getvalue()


def write_tar(path: Path, members: Iterable[Content | tarfile.TarInfo], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.write_bytes(make_tar(members, format))
    return path


def sample_members(labels: Iterable[int | str], prefix: str = "", image: bytes = b"image") -> list[Content]:
    """A .jpg and a .cls for each label; the image of sample i ends in its number."""
    return [
        member
        for i, label in enumerate(labels)
        for member in ((f"{prefix}{i:04d}.jpg", image + b"%d" % i), (f"{prefix}{i:04d}.cls", str(label).encode()))
    ]


def header(
    name: bytes = b"a.png",
    size: bytes = b"%011o\0" % 0,
    kind: bytes = b"0",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
) -> bytes:
    """A header of arbitrary fields with a right checksum."""
    block = bytearray(512)
    for start, field in ((0, name), (124, size), (148, b" " * 8), (156, kind), (257, magic), (345, prefix)):
        block[start : start + len(field)] = field
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def entry(content: bytes, **fields: bytes) -> bytes:
    """A header of arbitrary fields, and its content."""
    return header(size=b"%011o\0" % len(content), **fields) + content + bytes(-len(content) % 512)


def pax(**values: str) -> bytes:
    """The records of a PAX header."""
    return b"".join(pax_record(key, value.encode()) for key, value in values.items())


def pax_record(key: str, value: bytes) -> bytes:
    body = b" " + key.encode() + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body
