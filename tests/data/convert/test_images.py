"""What becomes of an image that is converted."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from partialfc.data.convert.image_structure import image_format, image_size
from partialfc.data.convert.images import ImageSettings, prepare
from partialfc.data.convert.source import Unreadable
from partialfc.errors import ConfigError

KEPT = {"JPEG": "jpg", "PNG": "png", "WebP": "webp"}
RESIZED = ImageSettings(resize=16)


def picture(width: int = 30, height: int = 20, mode: str = "RGB") -> Image.Image:
    """A smooth picture, each corner of its own colour."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def stored(data: bytes, how: ImageSettings) -> tuple[Image.Image, str]:
    result = prepare(data, how)
    assert not isinstance(result, Unreadable), result
    image = Image.open(io.BytesIO(result[0]))
    image.load()
    return image, result[1]


def reason(data: bytes, how: ImageSettings = ImageSettings()) -> str:  # noqa: B008 - frozen
    result = prepare(data, how)
    assert isinstance(result, Unreadable)
    assert len(result.reason.splitlines()) == 1
    return result.reason


@pytest.mark.parametrize("format", KEPT)
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "lossless": True}])
def test_jpeg_png_and_webp_keep_their_bytes(format: str, decode: bool, options: dict[str, bool]) -> None:
    data = encoded(picture(), format, **options)
    assert image_size(data, image_format(data)) == (30, 20)
    assert prepare(data, ImageSettings(decode=decode)) == (data, KEPT[format])


@pytest.mark.parametrize("format", KEPT)
@pytest.mark.parametrize("trailer", [bytes(700), b"trailing garbage\n", b"\xff" * 5])
def test_what_follows_the_end_of_an_image_is_no_reason_to_refuse_it(format: str, trailer: bytes) -> None:
    data = encoded(picture(), format) + trailer
    assert prepare(data, ImageSettings()) == (data, KEPT[format])


def test_a_jpeg_with_thumbnail_comment_fill_bytes_and_junk_between_segments_is_taken() -> None:
    thumbnail = encoded(picture(8, 8), "JPEG")
    data = encoded(picture(), "JPEG", comment=b"\xff\xd9\xff\xc0", exif=b"Exif\0\0" + thumbnail)
    odd = data[:20] + b"junk\xff\xff\xff" + data[21:]  # after the first segment
    assert prepare(odd, ImageSettings()) == (odd, "jpg")
    assert image_size(odd, "jpg") == (30, 20)
    Image.open(io.BytesIO(odd)).load()
    half = odd[:-20]
    assert b"\xff\xd9" in half
    assert reason(half) == "is truncated: the end of the JPEG is missing"


@pytest.mark.parametrize("format", KEPT)
def test_every_truncated_image_is_unreadable(format: str) -> None:
    data = encoded(picture(), format)
    whole = len(data) - 4 if format == "PNG" else len(data)  # without the last checksum a PNG is still decoded
    assert len({reason(data[:end]) for end in range(whole)}) > 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "is not a JPEG, PNG, WebP, GIF, BMP or TIFF image; it begins with b'<html>"),
        (bytes(100), "is not a JPEG"),
        (b"\xff\xd8\xff\xd9", "holds no picture"),
        (b"\xff\xd8" + b"\xff\xe0\0\2" * 20_000, "more than 10,000 segments"),
        (b"\xff\xd8\xff\xda\0\2\xff\xd9", "its size is 0 × 0"),
        (b"RIFF\x20\0\0\0WEBPJUNK" + bytes(40), "first chunk is b'JUNK'"),
        (b"GIF89a", "cannot be decoded: "),
        (b"BM" + bytes(60), "cannot be decoded: "),
        (b"II*\0" + bytes(60), "cannot be decoded: "),
    ],
)
def test_what_is_no_image_is_unreadable_in_one_line(data: bytes, words: str) -> None:
    assert words in reason(data)


def test_a_picture_with_damaged_content_is_found_by_decoding_only() -> None:
    data = encoded(picture(), "PNG")
    damaged = data[:60] + bytes(10) + data[70:]
    assert prepare(damaged, ImageSettings()) == (damaged, "png")
    assert reason(damaged, ImageSettings(decode=True)).startswith("cannot be decoded: ")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF"])
def test_more_pixels_than_the_trainer_takes_are_refused(format: str) -> None:
    data = encoded(picture(), format)
    assert not isinstance(prepare(data, ImageSettings(max_pixels=600)), Unreadable)
    assert reason(data, ImageSettings(max_pixels=599)) == "has 30 × 20 pixels, more than data.max_pixels=599"
    wide = encoded(Image.new("L", (1, 500)), format)
    assert "has 500 × 250,000 pixels" in reason(
        encoded(Image.new("L", (1, 500)).rotate(90, expand=True), format), ImageSettings(resize=500, fit="keep")
    ).replace("250,000 × 500", "500 × 250,000")
    assert "more than data.max_pixels" in reason(wide, ImageSettings(resize=500, fit="keep"))


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_gif_bmp_and_tiff_become_png_of_the_same_pixels(format: str) -> None:
    original = picture().quantize(64).convert("RGB") if format == "GIF" else picture()
    image, extension = stored(encoded(original, format), ImageSettings())
    assert (extension, image.format, image.mode) == ("png", "PNG", "RGB")
    expected = np.asarray(Image.open(io.BytesIO(encoded(original, format))).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_of_an_animated_gif_the_first_picture_is_stored() -> None:
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    image, _ = stored(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), ImageSettings())
    assert np.asarray(image.convert("L")).tolist() == [[10] * 4] * 4


def test_sixteen_bits_become_eight_by_scale() -> None:
    grey = Image.fromarray(np.array([[0, 128, 129, 32768, 65535]], dtype=np.uint16))
    image, _ = stored(encoded(grey, "TIFF"), ImageSettings())
    assert (image.mode, np.asarray(image).tolist()) == ("L", [[0, 0, 1, 128, 255]])
    flat = Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))
    image, _ = stored(encoded(flat, "PNG"), RESIZED)
    assert np.unique(np.asarray(image)).tolist() == [156]


def test_floating_point_pixels_have_no_scale_and_are_refused() -> None:
    assert "no known range" in reason(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    if mode == "P":
        clear = Image.new("P", (4, 4), 0)
        clear.putpalette([0, 0, 0, 9, 9, 9])
        data = encoded(clear, "PNG", transparency=0)
    else:
        data = encoded(Image.new(mode, (4, 4), 0), "PNG")
    image, _ = stored(data, RESIZED)
    assert image.mode == ("L" if mode == "LA" else "RGB")
    assert np.asarray(image).min() == 255


def test_cmyk_palettes_and_black_and_white_become_rgb_or_grey() -> None:
    assert stored(encoded(picture(mode="CMYK"), "JPEG"), RESIZED)[0].mode == "RGB"
    assert stored(encoded(picture(mode="P"), "PNG"), RESIZED)[0].mode == "RGB"
    assert stored(encoded(picture(mode="1"), "PNG"), RESIZED)[0].mode == "L"
    assert stored(encoded(picture(mode="L"), "JPEG"), RESIZED)[0].mode == "L"


@pytest.mark.parametrize("format", KEPT)
def test_a_resized_image_keeps_its_format(format: str) -> None:
    image, extension = stored(encoded(picture(), format), RESIZED)
    assert (image.size, image.format, extension) == ((16, 16), format.upper(), KEPT[format])
    expected = np.asarray(picture().resize((16, 16), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(np.asarray(image) - expected).mean() < 4


def test_keep_gives_the_shorter_side_the_size_and_squash_both() -> None:
    for size, expected in [((30, 20), (24, 16)), ((20, 30), (16, 24)), ((5, 5), (16, 16)), ((1, 9), (16, 144))]:
        data = encoded(picture(*size), "PNG")
        assert stored(data, ImageSettings(resize=16, fit="keep"))[0].size == expected
        assert stored(data, RESIZED)[0].size == (16, 16)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright_once(format: str, orientation: int) -> None:
    undo = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # transposes upright to what the camera stores
    lying = picture(64, 48) if undo is None else picture(64, 48).transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, _ = stored(encoded(lying, format, exif=exif), ImageSettings(resize=24, fit="keep"))
    assert image.size == (32, 24)
    assert "exif" not in image.info
    expected = np.asarray(picture(64, 48).resize((32, 24), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(np.asarray(image) - expected).mean() < 6


def test_an_image_that_has_the_size_already_keeps_its_bytes() -> None:
    data = encoded(picture(16, 16), "JPEG")
    assert prepare(data, RESIZED) == (data, "jpg")
    damaged_exif = encoded(picture(16, 16), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert prepare(damaged_exif, RESIZED) == (damaged_exif, "jpg")


def test_equal_bytes_give_equal_bytes() -> None:
    for format in ("JPEG", "PNG", "WebP", "GIF"):
        data = encoded(picture(40, 30), format)
        assert prepare(data, RESIZED) == prepare(data, RESIZED)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="fit must be one of squash, keep, got 'crop'"):
        ImageSettings(fit="crop")
    for size in (0, 7000):
        with pytest.raises(ConfigError, match=r"must have 1\.\.40,000,000 pixels"):
            ImageSettings(resize=size)


@settings(max_examples=50)
@given(
    format=st.sampled_from(["JPEG", "PNG", "WebP", "GIF", "BMP"]),
    seed=st.integers(0, 1 << 30),
    flips=st.integers(1, 8),
    how=st.sampled_from([ImageSettings(), ImageSettings(decode=True), RESIZED, ImageSettings(resize=9, fit="keep")]),
)
def test_flipped_bytes_are_unreadable_or_an_image(format: str, seed: int, flips: int, how: ImageSettings) -> None:
    data, rng = bytearray(encoded(picture(), format)), random.Random(seed)
    for _ in range(flips):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    result = prepare(bytes(data), how)
    if isinstance(result, Unreadable):
        assert len(result.reason.splitlines()) == 1
    else:
        assert result[1] in KEPT.values()
        if how.resize is not None:
            Image.open(io.BytesIO(result[0])).load()
