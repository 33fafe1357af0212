"""Careful decoding of images that anybody may have made."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

TRAINED_FORMATS = ("PNG", "JPEG", "WebP")

# The largest encodings of a pixel and of all else: four channels of 16 bits uncompressed; colour profiles and texts.
_MAX_PIXEL_BYTES, _MAX_HEADER_BYTES = 8, 16 << 20


class BadImage(ValueError):
    """An image that cannot be used; the text goes on where its name ends: ``cannot be decoded: …``."""


def require_plausible_size(num_bytes: int, max_pixels: int) -> None:
    """Raise BadImage if an encoding is larger than that of any image of ``max_pixels``: it need not be read."""
    if num_bytes > max_pixels * _MAX_PIXEL_BYTES + _MAX_HEADER_BYTES:
        raise BadImage(f"has {num_bytes:,} bytes, more than an image of data.max_pixels={max_pixels:,} pixels can have")


def require_few_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise BadImage if an image is empty or has more than ``max_pixels``."""
    if width * height < 1:
        raise BadImage(f"cannot be decoded: its size is {width} × {height}")
    if width * height > max_pixels:
        raise BadImage(f"has {width:,} × {height:,} pixels, more than data.max_pixels={max_pixels:,}")


@contextmanager
def open_image(data: bytes, max_pixels: int, formats: tuple[str, ...] = TRAINED_FORMATS) -> Iterator[Image.Image]:
    """Open an encoded image, not yet decoded, as a context; what Pillow raises inside it becomes BadImage.

    Args:
        data: encoded image, which is not trusted.
        max_pixels: the most pixels that it may have.
        formats: Pillow's names of the decoders that may be used.

    Raises:
        BadImage: it is of another format, has more than ``max_pixels``, or cannot be decoded.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=formats) as image:
            require_few_pixels(image.width, image.height, max_pixels)  # before memory is taken for them
            yield image
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"cannot be decoded: not a {', '.join(formats[:-1])} or {formats[-1]} image") from error
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise BadImage(f"cannot be decoded: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error


def to_8_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16-bit grey values, scaled to 8 bits, where Pillow would cut them off at 255; others as is."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if not sixteen:
        return image
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
