"""A look at an encoded image that costs microseconds: its format by its first bytes, its size, whether it is whole."""

from __future__ import annotations

import re
import struct

from partialfc.data.decode import BadImage

_SIGNATURES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),  # of 64-bit offsets
    (b"MM\0+", "tiff"),
)

_JPEG_SEGMENT = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])", re.DOTALL)  # a marker that a length or the end follows
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_MAX_JPEG_SEGMENTS = 10_000  # before the first scan; a colour profile may take 255, a depth map a thousand


def image_format(data: bytes) -> str:
    """Return the format that an image's first bytes tell: jpg, png, webp, gif, bmp, tiff.

    Raises:
        BadImage: it is none of these.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if not data:
        raise BadImage("is empty")
    raise BadImage(f"is not a JPEG, PNG, WebP, GIF, BMP or TIFF image; it begins with {data[:12]!r}")


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Return width and height of a jpg, png or webp as its headers tell them.

    What follows the end of the image is ignored: cameras and file systems put something there.

    Raises:
        BadImage: there is no such header, or the end of the image is missing.
    """
    try:
        return {"jpg": _jpeg_size, "png": _png_size, "webp": _webp_size}[name](data)
    except (struct.error, IndexError):
        raise BadImage("is truncated: it ends in its header") from None


def _jpeg_size(data: bytes) -> tuple[int, int]:
    position, size = 2, (0, 0)
    for _ in range(_MAX_JPEG_SEGMENTS):
        found = _JPEG_SEGMENT.search(data, position)
        if found is None:
            raise BadImage("is truncated: it ends in its header")
        marker, start = found[1][0], found.end()
        if marker == _END_OF_IMAGE:
            raise BadImage("holds no picture: the JPEG ends after its header")
        (length,) = struct.unpack_from(">H", data, start)
        if marker in _FRAME_HEADERS:
            height, width = struct.unpack_from(">HH", data, start + 3)
            size = width, height
        position = start + length
        if marker == _START_OF_SCAN:
            # In a scan 0xff is always followed by 0, so this is an end: of this image, or of one that follows it.
            if data.rfind(b"\xff\xd9", position) < 0:
                raise BadImage("is truncated: the end of the JPEG is missing")
            return size
    raise BadImage(f"is no usable JPEG: more than {_MAX_JPEG_SEGMENTS:,} segments before its picture")


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise BadImage("is no usable PNG: its header is missing")
    width, height = struct.unpack_from(">II", data, 16)
    if data.rfind(b"IEND", 33) < 0:
        raise BadImage("is truncated: the end of the PNG is missing")
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    (length,) = struct.unpack_from("<I", data, 4)
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        size = width & 0x3FFF, height & 0x3FFF
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        width, width_high, height, height_high = struct.unpack_from("<HBHB", data, 24)
        size = (width | width_high << 16) + 1, (height | height_high << 16) + 1
    else:
        raise BadImage(f"is no usable WebP: its first chunk is {kind!r}")
    if length + 8 > len(data):
        raise BadImage(f"is truncated: a WebP of {length + 8:,} bytes, of which {len(data):,} are there")
    return size
