"""What becomes of an image on its way: checked and kept byte for byte, or decoded, resized and encoded again."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from partialfc.data.convert.image_structure import image_format, image_size
from partialfc.data.convert.source import Unreadable
from partialfc.data.decode import BadImage, open_image, require_few_pixels, require_plausible_size, to_8_bits
from partialfc.errors import ConfigError

FITS = ("squash", "keep")

_PILLOW = {"jpg": "JPEG", "png": "PNG", "webp": "WebP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF"}
_KEPT = ("jpg", "png", "webp")  # the formats of a data set folder
_ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = (5, 6, 7, 8)  # they swap width and height


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """What to do with every image.

    Attributes:
        decode: decode images to see whether that works, even if their bytes are kept.
        resize: pixels of a side; None keeps all sizes.
        fit: ``squash`` makes every image a square of ``resize`` pixels a side; ``keep`` keeps the aspect, and its
            shorter side gets ``resize`` pixels.
        max_pixels: of an image as it comes and as it is stored; the trainer refuses more than ``data.max_pixels``.

    Raises:
        ConfigError: a value is out of range.
    """

    decode: bool = False
    resize: int | None = None
    fit: str = "squash"
    max_pixels: int = 40_000_000

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ConfigError(f"fit must be one of {', '.join(FITS)}, got {self.fit!r}")
        if self.resize is not None and not 1 <= self.resize**2 <= self.max_pixels:
            raise ConfigError(
                f"an image resized to {self.resize} × {self.resize} must have 1..{self.max_pixels:,} pixels"
            )


def prepare(data: bytes, settings: ImageSettings) -> tuple[bytes, str] | Unreadable:
    """Return the bytes to store for an encoded image, and their extension: jpg, png or webp.

    JPEG, PNG and WebP keep their bytes, after a check of microseconds that finds truncated ones; the first picture of
    a GIF, BMP or TIFF becomes a PNG. With ``settings.resize`` an image is turned upright as its EXIF tag tells,
    transparency is laid on white, greys become 8-bit grey and all else RGB, and it is encoded in its own format (JPEG
    and lossy WebP with quality 95, JPEG without chroma subsampling); if there is nothing to change, it keeps its bytes.

    Equal bytes give equal bytes, with the same version of Pillow.
    """
    try:
        require_plausible_size(len(data), settings.max_pixels)
        name = image_format(data)
        if name in _KEPT:
            require_few_pixels(*image_size(data, name), settings.max_pixels)
            if not settings.decode and settings.resize is None:
                return data, name
        with open_image(data, settings.max_pixels, (_PILLOW[name],)) as image:
            changed = _changed(image, settings, to_png=name not in _KEPT)
            if changed is None:
                return data, name
            return _encoded(changed, name, data), name if name in _KEPT else "png"
    except BadImage as error:
        return Unreadable(str(error))


def _changed(image: Image.Image, settings: ImageSettings, to_png: bool) -> Image.Image | None:
    """Decode an image; return it as it is to be stored, or None if that is as it came."""
    size = _target_size(image.size, settings)
    if settings.resize is not None:
        image.draft(None, (2 * size[0], 2 * size[1]))  # a JPEG decoder halves sizes at little cost, as far as this
    image.load()
    if settings.resize is None and not to_png:
        return None
    plain = _plain(image)
    orientation = _orientation(image)
    if orientation in _UPRIGHT:
        plain = plain.transpose(_UPRIGHT[orientation])
    if orientation in _QUARTER_TURNS:
        size = size[1], size[0]
    if plain is image and size == image.size and not to_png:
        return None
    return plain if size == plain.size else plain.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data; the picture is fine
        return 1


def _plain(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit grey (L) or RGB, transparency laid on white."""
    image = to_8_bits(image)
    if image.mode in ("I", "F") or ";" in image.mode:
        raise BadImage(f"has pixels of Pillow's mode {image.mode}, whose values have no known range")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _target_size(size: tuple[int, int], settings: ImageSettings) -> tuple[int, int]:
    side = settings.resize
    if side is None:
        return size
    if settings.fit == "squash":
        return side, side
    shorter = min(size)
    width, height = [(length * side + shorter // 2) // shorter for length in size]
    require_few_pixels(width, height, settings.max_pixels)
    return width, height


def _encoded(image: Image.Image, name: str, original: bytes) -> bytes:
    encoded = io.BytesIO()
    # New, without the colour profile and texts of the original: they described other pixels.
    bare = Image.new(image.mode, image.size)
    bare.paste(image)
    if name == "jpg":
        bare.save(encoded, "JPEG", quality=95, subsampling="4:4:4")
    elif name == "webp":
        bare.save(encoded, "WebP", quality=95, lossless=b"VP8L" in original)
    else:
        bare.save(encoded, "PNG")
    return encoded.getvalue()
