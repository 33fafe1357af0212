"""Careful decoding, as the trainer and the conversion share it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partialfc.data.dataset import DatasetWriter, TarDataset
from partialfc.data.decode import BadImage, open_image, require_plausible_size
from partialfc.data.loader import LoaderSettings, decode


def encoded(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_of_grey_are_trained_by_scale_and_not_cut_off(tmp_path: Path, channels: int) -> None:
    values = np.array([[0, 128, 129, 255], [256, 4096, 32768, 65535]] * 2, dtype=np.uint16)
    with DatasetWriter(tmp_path / "d") as writer:
        writer.write("deep", encoded(Image.fromarray(values), "PNG"), "png", 0)
        writer.finish([{"name": "a"}])
    image = decode(TarDataset(tmp_path / "d"), 0, LoaderSettings(image_size=4, channels=channels))
    pixels = np.asarray(image).reshape(4, 4, channels)
    assert (pixels == np.round(values / 257)[..., None]).all()


def test_only_the_named_decoders_are_used() -> None:
    gif = encoded(Image.new("L", (4, 4)), "GIF")
    with pytest.raises(BadImage, match=r"^cannot be decoded: not a PNG, JPEG or WebP image$"), open_image(gif, 100):
        pass
    with open_image(gif, 100, ("GIF",)) as image:
        assert image.size == (4, 4)


def test_an_error_while_decoding_is_one_line() -> None:
    data = encoded(Image.effect_noise((40, 40), 50), "PNG")
    with pytest.raises(BadImage, match=r"^cannot be decoded: ") as refused, open_image(data[:300], 10_000) as image:
        image.load()
    assert len(str(refused.value).splitlines()) == 1


def test_memory_that_is_not_there_is_no_fault_of_the_image() -> None:
    with pytest.raises(MemoryError), open_image(encoded(Image.new("L", (4, 4)), "PNG"), 100):
        raise MemoryError


def test_an_encoding_larger_than_any_image_is_refused() -> None:
    require_plausible_size((16 << 20) + 8, 1)
    with pytest.raises(BadImage, match=r"has 16,777,225 bytes, more than an image of data\.max_pixels=1 pixels can"):
        require_plausible_size((16 << 20) + 9, 1)
