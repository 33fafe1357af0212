"""Tar archives: deterministic headers when writing, a careful walk over headers when reading.

Read are the members that GNU tar, bsdtar, Python's tarfile and webdataset write: ustar, GNU long names and sizes, and
PAX extended headers. Written is plain ustar.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn
from zlib import adler32

from partialfc.errors import DataError, InvalidData

BLOCK = 512
MAX_NAME_BYTES = 4096
END_OF_ARCHIVE = bytes(2 * BLOCK)
IMAGE_EXTENSIONS = ("png", "jpg", "webp")

_ZEROS = bytes(BLOCK)
_HALF = BLOCK // 2
_USTAR_LIMIT = 8**11  # bytes of a member; a larger size does not fit the field of the header
_MAX_SIZE = 2**63
_MAX_EXTENDED = 1 << 20  # bytes of an extended header; tools write a few hundred
_NEAR, _WINDOW, _PEEK = 1 << 14, 1 << 17, 1 << 12  # bytes: see TarReader.read
_PAX_NAMES = {b"path", b"size"}
_REFUSED = {
    b"0": "a file with a folder's name",
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a FIFO",
    b"K": "a link",
    b"S": "a sparse file",
}
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


def ustar_header(name: str, size: int) -> bytes:
    """Return the 512-byte header of a regular file: mode 0644, no owner or time, so equal content gives equal bytes."""
    encoded = name.encode()
    if not 0 < len(encoded) <= 100:
        raise DataError(f"member name must have 1..100 bytes in UTF-8, got {len(encoded)}: {name!r}")
    if not 0 <= size < _USTAR_LIMIT:
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


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of the content, from the start of the file
    size: int


class TarReader:
    """Reader of a tar's members, from an open file.

    Args:
        path: of the file, for messages.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self.num_bytes = os.fstat(file.fileno()).st_size
        self._descriptor = file.fileno()
        self._window, self._start = b"", 0  # bytes of the file, and where they begin

    def members(self) -> Iterator[Member]:
        """Yield the regular members; folders and extended headers are passed over.

        Raises:
            OSError: the file cannot be read.
            InvalidData: the archive is damaged or truncated, or holds links, devices, sparse files, names that lead out
                of it, or extended headers that contradict the header; the message names the offset.
        """
        position, name, pax_size = 0, None, None  # the last two of an extended header
        while position < self.num_bytes:
            header = self.read(position, BLOCK)
            if not header[0] and header == _ZEROS:
                if name is not None or pax_size is not None:
                    self._refuse(position, "the archive ends after an extended header")
                if self.read(position, _WINDOW).strip(b"\0"):  # only padding is expected
                    self._refuse(position, "the archive ends, but more follows; were several joined into one file?")
                return
            size = self._checked_size(header, position)
            offset, kind = position + BLOCK, header[156:157]
            if offset + size > self.num_bytes:
                self._refuse(position, f"truncated: its member reaches to byte {offset + size}, the file ends before")
            if kind != b"0" and kind in b"xgL":
                new_name, new_size = self._extended(kind, size, position)
                if None not in (name, new_name) and name != new_name:
                    self._refuse(position, "two extended headers give different names")
                name = new_name if name is None else name
                pax_size = new_size if pax_size is None else pax_size
            else:
                if pax_size is not None and pax_size != size:
                    size = self._large_size(size, pax_size, position)
                member = Member(self._name(header, name, position), offset, size)
                name = pax_size = None
                if self._is_file(member, kind, position):
                    yield member
            position = offset + size + -size % BLOCK
        self._refuse(self.num_bytes, "truncated: the archive has no end; two blocks of zeros were expected")

    def read(self, position: int, size: int) -> bytes:
        """Return ``size`` bytes at ``position``, fewer at the end of the file.

        Small members are read in sequence, with all that lies between their headers; large ones are stepped over.
        """
        start = position - self._start
        if start < 0 or start + size > len(self._window):
            window = _WINDOW if start < len(self._window) + _NEAR else _PEEK
            self._window, self._start, start = os.pread(self._descriptor, max(size, window), position), position, 0
        return self._window[start : start + size]

    def _checked_size(self, header: bytes, position: int) -> int:
        if len(header) < BLOCK:
            self._refuse(position, "truncated: the header is cut off")
        field, checksum = header[124:136].strip(b" \0"), header[148:156].strip(b" \0")
        # Sums of 256 bytes are below the modulus of Adler-32, whose low half then is the sum: much faster than sum().
        total = (adler32(header[:_HALF], 0) & 0xFFFF) + (adler32(header[_HALF:], 0) & 0xFFFF)
        total += 8 * 32 - (adler32(header[148:156], 0) & 0xFFFF)  # the checksum counts itself as spaces
        try:
            matches = int(checksum, 8) == total
        except ValueError:
            if position == 0 and header.startswith(_COMPRESSED):
                self._refuse(0, "the file is compressed; samples are read at random, so decompress it first")
            self._refuse(position, f"not a tar header (checksum {checksum!r})")
        if not matches:
            self._refuse(position, "the checksum does not match; the file is damaged or not a tar archive")
        try:
            # Digits only: int() would also take "1_0" and "0o17".
            size = int(field, 8) if field.isdigit() else 0 if not field else -1
        except ValueError:
            size = -1
        if header[124] == 0x80:  # base 256
            size = int.from_bytes(header[125:136], "big")
        if not 0 <= size < _MAX_SIZE:
            self._refuse(position, f"not a tar header (size {header[124:136]!r})")
        return size

    def _name(self, header: bytes, extended: bytes | None, position: int) -> str:
        if extended is not None:
            encoded = extended
        else:
            encoded = header[0:100].partition(b"\0")[0]
            if header[345] and header[257:263] == b"ustar\0":
                encoded = header[345:500].partition(b"\0")[0] + b"/" + encoded
        try:
            name = encoded.decode()
        except UnicodeDecodeError:
            self._refuse(position, f"member name {encoded[:100]!r} is not UTF-8")
        if not name:
            self._refuse(position, "a member without a name")
        if name[0] == "/" or (".." in name and ".." in name.split("/")):
            self._refuse(position, f"member name {name!r} leads out of the archive")
        if extended is not None and (len(encoded) > MAX_NAME_BYTES or "\0" in name):
            self._refuse(position, f"member name {name[:100]!r} is longer than {MAX_NAME_BYTES} bytes or holds a NUL")
        return name

    def _is_file(self, member: Member, kind: bytes, position: int) -> bool:
        """Return True for a file, False for a folder; anything else is refused."""
        ends_in_slash = member.name[-1] == "/"
        if kind == b"5" or (kind == b"\0" and ends_in_slash):  # the latter is a folder in old tars
            if member.size:
                self._refuse(position, f"folder {member.name!r} has {member.size:,} bytes of content")
            return False
        if kind not in (b"0", b"\0") or ends_in_slash:
            what = _REFUSED.get(kind, f"of the unknown type {kind!r}")
            self._refuse(position, f"member {member.name!r} is {what}; only regular files are accepted")
        return True

    def _extended(self, kind: bytes, size: int, position: int) -> tuple[bytes | None, int | None]:
        """Return the name and the size that an extended header gives to the member after it."""
        if size > _MAX_EXTENDED:
            self._refuse(position, f"an extended header of {size:,} bytes; up to {_MAX_EXTENDED:,} are read")
        content = self.read(position + BLOCK, size)
        return (content.partition(b"\0")[0], None) if kind == b"L" else self._pax(content, kind, position)

    def _pax(self, content: bytes, kind: bytes, position: int) -> tuple[bytes | None, int | None]:
        """Return the path and size that a PAX header gives, of records ``LENGTH KEY=VALUE\\n``."""
        found: dict[bytes, bytes] = {}
        start, end = 0, len(content.rstrip(b"\0"))
        while start < end:
            space = content.find(b" ", start, start + 8)
            length = content[start:space]
            stop = start + int(length) if space > start and length.isdigit() else 0
            key, equals, value = content[space + 1 : stop - 1].partition(b"=")
            if not start < space < stop <= end or content[stop - 1] != 0x0A or not equals:
                self._refuse(position, f"damaged PAX header: no record at its byte {start}")
            start = stop
            if key.startswith(b"GNU.sparse."):
                self._refuse(position, "a sparse file; only regular files are accepted")
            if key in _PAX_NAMES and found.setdefault(key, value) != value:
                self._refuse(position, f"a PAX header gives {key.decode()} twice")
        if found and kind == b"g":
            self._refuse(position, f"a global PAX header sets {b', '.join(found).decode()} of all members")
        size = found.get(b"size")
        if size is not None and not re.fullmatch(rb"[0-9]{1,18}", size):
            self._refuse(position, f"a PAX header gives the size {size[:40]!r}")
        return found.get(b"path"), None if size is None else int(size)

    def _large_size(self, size: int, pax_size: int, position: int) -> int:
        """Return the size of a PAX header, which may differ from the header's only where that has no room for it."""
        if pax_size < _USTAR_LIMIT or size not in (0, _USTAR_LIMIT - 1):
            self._refuse(position, f"a PAX header gives the size {pax_size:,}, and the header {size:,}")
        if position + BLOCK + pax_size > self.num_bytes:
            end = position + BLOCK + pax_size
            self._refuse(position, f"truncated: its member reaches to byte {end}, the file ends before")
        return pax_size

    def _refuse(self, position: int, problem: str) -> NoReturn:
        raise InvalidData(f"{self.path}: header at byte {position}: {problem}")
