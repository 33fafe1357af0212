"""Images that decode to gigabytes, and errors of the processes that load."""

from __future__ import annotations

import io
import multiprocessing
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from partialfc.data.dataset import DatasetWriter, TarDataset
from partialfc.data.loader import Batch, LoaderSettings, build_loader, evaluation_batches, running
from partialfc.data.order import BatchOrder
from partialfc.errors import DataUnavailable, InvalidData
from tests.harness.data_sets import png


def _dataset(folder: Path, content: bytes) -> TarDataset:
    with DatasetWriter(folder) as writer:
        writer.write("fine", png(1), "png", 0)
        writer.write("bad-one", content, "png", 0)
        writer.finish([{"name": "a"}])
    return TarDataset(folder)


def _load(dataset: TarDataset, workers: int = 0, **changes: int) -> list[Batch]:
    settings = LoaderSettings(image_size=8, channels=1, workers=workers, **changes)
    with running(build_loader(dataset, settings, BatchOrder(num_samples=2, batch_size=2), 0, 1)) as found:
        return list(found)


def _promising_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header names a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)  # four channels of 16 bits
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(10))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path, workers: int) -> None:
    dataset = _dataset(tmp_path / "d", _promising_png(13_000, 13_000))
    with pytest.raises(InvalidData) as refused:
        _load(dataset, workers)
    assert str(refused.value) == (
        f"{tmp_path}/d/shard-000000.tar: sample 'bad-one' (index 1) has 13,000 × 13,000 pixels, more than "
        "data.max_pixels=40,000,000"
    )
    with pytest.raises(InvalidData, match="13,000 × 13,000 pixels"):
        list(evaluation_batches(dataset, LoaderSettings(image_size=8, channels=1), 2))


def test_the_limit_is_a_setting(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.new("L", (30, 20), 7).save(encoded, "PNG")
    dataset = _dataset(tmp_path / "d", encoded.getvalue())
    assert len(_load(dataset, max_pixels=600)) == 1
    with pytest.raises(InvalidData, match=r"30 × 20 pixels, more than data\.max_pixels=599"):
        _load(dataset, max_pixels=599)


def test_an_encoding_too_large_for_any_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = _dataset(tmp_path / "d", png(3))
    monkeypatch.setattr(dataset, "read", lambda i: pytest.fail("read"))
    monkeypatch.setattr(dataset, "num_bytes", lambda i: 3 << 30)  # as of a member of a sparse shard
    with pytest.raises(InvalidData, match=r"sample '.*' \(index \d\) has 3,221,225,472 bytes, more than an image"):
        _load(dataset)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>", "cannot be decoded: not a PNG, JPEG or WebP image"),
        (png(3)[:45], "cannot be decoded: "),
        (png(3)[:45] + bytes(30), "cannot be decoded: "),
    ],
)
def test_an_unreadable_image_is_one_line_with_shard_and_key(
    tmp_path: Path, workers: int, content: bytes, words: str
) -> None:
    with pytest.raises(InvalidData) as refused:
        _load(_dataset(tmp_path / "d", content), workers)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path}/d/shard-000000.tar: sample 'bad-one' (index 1) {words}")
    assert len(message.splitlines()) == 1
    assert "object at" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_gone_is_one_line_and_no_reason_to_give_up(tmp_path: Path, workers: int) -> None:
    dataset = _dataset(tmp_path / "d", png(2))
    (tmp_path / "d" / "shard-000000.tar").unlink()
    with pytest.raises(
        DataUnavailable, match=r"^\S*shard-000000\.tar: sample .* cannot be read: No such file"
    ) as found:
        _load(dataset, workers)
    assert found.value.exit_code == 1


def test_a_loader_process_that_is_killed_is_one_line(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path / "d", png(2))
    settings = LoaderSettings(image_size=8, channels=1, workers=1)

    def load_on() -> None:
        order = BatchOrder(num_samples=2, batch_size=1)
        with running(build_loader(dataset, settings, order, 0, 10_000)) as found:
            next(found)
            for child in multiprocessing.active_children():
                child.kill()
            list(found)

    with pytest.raises((DataUnavailable, RuntimeError)) as error:  # torch may raise it wherever the main thread is
        load_on()
    assert len(str(error.value).splitlines()) == 1


def test_an_error_without_a_name_of_ours_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise KeyError("a mistake\nof two lines")

    monkeypatch.setattr("partialfc.data.loader.augment_by_name", lambda name: broken)
    with pytest.raises(DataUnavailable) as error:
        _load(_dataset(tmp_path / "d", png(2)), workers=1)
    assert str(error.value) == r"batch of step 1: KeyError: 'a mistake\nof two lines'"
