"""Scanning of fonts for the characters that they really draw, and rendering on a square canvas.

The functions take lists of code points and run in worker processes, one font file at a time, so that caches stay hot.
"""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from partialfc.data.glyphs.fonts import FontFile
from partialfc.errors import DataError

# Unicode's Han ideographs by block. Compatibility ideographs (F900–FAFF, 2F800–2FA1F) are left out on purpose: each
# duplicates one of these by definition.
HAN_BLOCKS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0x4E00, 0x9FFF),),  # unified repertoire and ordering (URO)
    ((0x3400, 0x4DBF),),  # extension A
    ((0x20000, 0x2A6DF), (0x2A700, 0x2EE5F), (0x30000, 0x323AF)),  # extensions B; C–F and I; G and H
)
SCAN_EM = 32  # pixels; fixed, so that the choice of characters does not depend on the image size
FILL = 0.88  # of the canvas: the larger side of a typical character
BACKGROUND = 255


@dataclass(frozen=True, slots=True)
class Scan:
    """Drawings of a font for a range of code points: arrays of one length, blank glyphs left out."""

    codepoints: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]  # of the bitmap: equal for equal drawings
    extents: npt.NDArray[np.uint8]  # larger side of the ink box in pixels, at SCAN_EM


def han_codepoints(font: FontFile) -> npt.NDArray[np.int64]:
    """Return the Han ideographs that the font maps to a glyph other than glyph 0, ascending."""
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # its warnings concern tables that are not used
    try:
        with TTFont(font.path, fontNumber=font.index, lazy=True) as tables:
            missing = tables.getGlyphName(0)
            codepoints = sorted(codepoint for codepoint, name in tables.getBestCmap().items() if name != missing)
    except Exception as error:  # damaged tables raise any kind of error
        raise DataError(f"font {font.path} (face {font.index}) cannot be read: {error}") from error
    mapped = np.array(codepoints, dtype=np.int64)
    ranges = [limits for block in HAN_BLOCKS for limits in block]
    return mapped[np.any([(first <= mapped) & (mapped <= last) for first, last in ranges], axis=0)]


def scan(font: FontFile, codepoints: npt.NDArray[np.int64]) -> Scan:
    """Draw each code point once: many fonts map characters to blank glyphs or to one placeholder."""
    face = _face(font, SCAN_EM)
    kept, hashes, extents = list[int](), list[int](), list[int]()
    for codepoint in codepoints.tolist():
        ink = _ink(face, codepoint)
        if ink is not None:
            kept.append(codepoint)
            content = ink.tobytes() + bytes(min(side, 255) for side in ink.size)
            hashes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
            extents.append(min(max(ink.size), 255))
    return Scan(np.array(kept, dtype=np.int64), np.array(hashes, dtype=np.uint64), np.array(extents, dtype=np.uint8))


def render(font: FontFile, codepoints: npt.NDArray[np.int64], size: int, em: int) -> list[bytes]:
    """Return a PNG of each code point: dark ink on white, ``size`` × ``size`` grey pixels, drawn at ``em`` pixels."""
    face = _face(font, em)
    return [_png(_canvas(face, codepoint, size)) for codepoint in codepoints.tolist()]


def em_for(size: int, typical_extent: float) -> int:
    """Return the em size at which a font's typical character fills FILL of the canvas.

    Args:
        typical_extent: median larger side of its ink boxes at SCAN_EM; some fonts draw small on their em square.
    """
    return max(4, round(FILL * size * SCAN_EM / max(typical_extent, 1.0)))


def _canvas(face: ImageFont.FreeTypeFont, codepoint: int, size: int) -> Image.Image:
    canvas = Image.new("L", (size, size), BACKGROUND)
    ink = _ink(face, codepoint)
    if ink is None:
        return canvas
    room = size - 2  # one pixel of background on each side: no stroke is cut off
    if max(ink.size) > room:
        shrink = room / max(ink.size)
        ink = ink.resize((max(1, round(ink.width * shrink)), max(1, round(ink.height * shrink))), Image.Resampling.BOX)
    canvas.paste(0, ((size - ink.width) // 2, (size - ink.height) // 2), ink)
    return canvas


def _ink(face: ImageFont.FreeTypeFont, codepoint: int) -> Image.Image | None:
    """Return a character's coverage, cropped to its ink (255); None if it is blank or cannot be drawn."""
    em = round(face.size)
    drawing = Image.new("L", (2 * em, 2 * em))  # ink may reach beyond the em square
    try:
        ImageDraw.Draw(drawing).text((em // 2, 3 * em // 2), chr(codepoint), fill=255, font=face, anchor="ls")
    except OSError:  # a damaged outline
        return None
    box = drawing.getbbox()
    return drawing.crop(box) if box else None


def _png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


@lru_cache(maxsize=2)
def _face(font: FontFile, em: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(font.path, em, index=font.index, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DataError(f"font {font.path} (face {font.index}) cannot be opened: {error}") from error
