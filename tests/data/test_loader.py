"""Batches: the same for any number of workers, and together the same for any world size."""

from __future__ import annotations

import io
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from partialfc.data.augment import LIGHT, Augment, augment_by_name, background, sample_rng, to_pixels
from partialfc.data.dataset import DatasetWriter, TarDataset
from partialfc.data.loader import Batch, LoaderSettings, build_loader, evaluation_batches, running
from partialfc.data.order import BatchOrder
from partialfc.errors import ConfigError, DataError

NUM_SAMPLES, BATCH = 23, 10
REGRESSION = [0.6105653526492182, 0.17621266038726857]  # a resumed run must draw the same numbers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TarDataset:
    folder = tmp_path_factory.mktemp("data") / "d"
    rng = np.random.default_rng(0)
    with DatasetWriter(folder, samples_per_shard=9) as writer:
        for i in range(NUM_SAMPLES):
            encoded = io.BytesIO()
            extension = ("png", "jpg", "webp")[i % 3]
            mode, shape = (("L", (16, 16)), ("RGB", (16, 16, 3)))[i % 2]
            image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)
            image.save(encoded, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[extension])
            writer.write(f"k{i}", encoded.getvalue(), extension, i % 5)
        writer.finish([{"name": str(i)} for i in range(5)])
    return TarDataset(folder)


def order_of(data: TarDataset, **changes: Any) -> BatchOrder:
    arguments = {"num_samples": data.num_samples, "batch_size": BATCH, "last_batch": "keep", "seed": 3}
    return BatchOrder(**arguments | changes)


def batches(
    data: TarDataset, start_step: int = 0, total_steps: int = 7, order: BatchOrder | None = None, **changes: Any
) -> list[Batch]:
    settings = LoaderSettings(**{"image_size": 16, "channels": 1, "augment": "light"} | changes)
    with running(build_loader(data, settings, order or order_of(data), start_step, total_steps)) as found:
        return list(found)


@pytest.fixture(scope="module")
def reference(data: TarDataset) -> list[Batch]:
    return batches(data)


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.step == b.step
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.images, b.images)
    assert (a.counts, a.counts_of_all_ranks) == (b.counts, b.counts_of_all_ranks)


def test_batches_have_the_promised_form(data: TarDataset, reference: list[Batch]) -> None:
    assert [batch.step for batch in reference] == list(range(7))
    for batch in reference:
        assert batch.images.shape == (len(batch.indices), 1, 16, 16)
        assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (
            torch.float32,
            torch.int64,
            torch.int64,
        )
        assert batch.images.min() >= -1
        assert batch.images.max() <= 1
        assert batch.labels.tolist() == data.labels[batch.indices.numpy()].tolist()
        assert (batch.images.flatten(1).std(1) > 0).all(), "images of the data set, and no others"
        assert batch.counts == batch.counts_of_all_ranks == [len(batch.labels)]
    # 23 samples in batches of 10: steps 2 and 5 end an epoch with 3 samples.
    assert [len(batch.indices) for batch in reference] == [10, 10, 3, 10, 10, 3, 10]
    epoch = torch.cat([batch.indices for batch in reference[:3]])
    assert sorted(epoch.tolist()) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(data: TarDataset, reference: list[Batch], workers: int) -> None:
    found = batches(data, workers=workers)
    assert len(found) == len(reference)
    for a, b in zip(found, reference, strict=True):
        assert_equal(a, b)


def test_spawned_workers_change_nothing(
    data: TarDataset, reference: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    data.read(0)  # a file is open, and must not travel
    settings = LoaderSettings(image_size=16, channels=1, augment="light", workers=1)
    loader = build_loader(data, settings, order_of(data), start_step=0, total_steps=2)
    loader.multiprocessing_context = "spawn"
    for a, b in zip(list(loader), reference[:2], strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("world_size", [2, 3, 4, 12])
def test_the_ranks_together_see_the_global_batch_pixel_for_pixel(
    data: TarDataset, reference: list[Batch], world_size: int
) -> None:
    shares = [batches(data, rank=rank, world_size=world_size, workers=rank == 1) for rank in range(world_size)]
    for step, alone in enumerate(reference):
        here = [share[step] for share in shares]
        assert max(len(batch.labels) for batch in here) <= -(-BATCH // world_size)
        assert [batch.counts_of_all_ranks for batch in here] == [alone.counts] * world_size
        fields = [torch.cat([getattr(batch, name) for batch in here]) for name in ("images", "labels", "indices")]
        assert_equal(Batch(step, *fields, alone.counts, alone.counts), alone)


def test_batches_from_any_step_on_are_those_of_an_uninterrupted_run(data: TarDataset, reference: list[Batch]) -> None:
    for a, b in zip(batches(data, start_step=4), reference[4:], strict=True):
        assert_equal(a, b)
    assert batches(data, start_step=7) == []


def test_augmentation_differs_between_epochs_and_seeds_and_not_otherwise(data: TarDataset) -> None:
    def images_by_index(**changes: Any) -> dict[int, torch.Tensor]:
        found = batches(data, total_steps=3, **changes)
        return {int(i): image for batch in found for i, image in zip(batch.indices, batch.images, strict=True)}

    first, again = images_by_index(), images_by_index(order=order_of(data, batch_size=9))
    assert all(torch.equal(first[i], again[i]) for i in first)
    other_seed = images_by_index(order=order_of(data, seed=4))
    assert not any(torch.equal(first[i], other_seed[i]) for i in first)
    second_epoch = {int(i): x for b in batches(data)[3:6] for i, x in zip(b.indices, b.images, strict=True)}
    assert not any(torch.equal(first[i], second_epoch[i]) for i in first)


def test_images_are_converted_and_resized(data: TarDataset) -> None:
    batch = batches(data, channels=3, image_size=24, augment="none", total_steps=1)[0]
    assert batch.images.shape == (BATCH, 3, 24, 24)
    exact = batches(data, channels=3, augment="none", total_steps=1)[0]
    i = next(slot for slot, index in enumerate(exact.indices.tolist()) if index % 6 == 0)  # grey and lossless
    stored = np.asarray(Image.open(io.BytesIO(data.read(int(exact.indices[i])))), dtype=np.float32)
    expected = torch.from_numpy(stored / 127.5 - 1)
    assert torch.allclose(exact.images[i], expected.expand(3, 16, 16), atol=1e-6)


@pytest.mark.parametrize(
    ("content", "workers"),
    [(b"no image", 0), (b"", 0), (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", 0), (b"no image", 1)],
)
def test_a_sample_that_cannot_be_decoded_is_named(tmp_path: Path, content: bytes, workers: int) -> None:
    with DatasetWriter(tmp_path / "d") as writer:
        writer.write("bad-one", content, "png", 0)
        writer.finish([{"name": "a"}])
    with pytest.raises(DataError, match=r"shard-000000\.tar: sample 'bad-one' \(index 0\) cannot be decoded"):
        batches(TarDataset(tmp_path / "d"), workers=workers)


def test_an_exception_leaves_no_loader_process_behind(data: TarDataset) -> None:
    settings = LoaderSettings(image_size=16, channels=1, workers=1)

    def fail_after_a_step() -> None:
        with running(build_loader(data, settings, order_of(data), 0, 7)) as found:
            assert next(found).step == 0
            assert multiprocessing.active_children()
            raise KeyError("in a step")

    with pytest.raises(KeyError) as error:
        fail_after_a_step()
    assert not multiprocessing.active_children(), error  # whose traceback refers to the loader


def test_wrong_arguments_are_refused_before_the_first_batch(data: TarDataset) -> None:
    for changes in ({"channels": 2}, {"augment": "heavy"}, {"micro_batches": 0}, {"image_size": 0}):
        with pytest.raises(ConfigError):
            batches(data, **changes)
    with pytest.raises(ConfigError):
        LoaderSettings(image_size=16, channels=2)


@pytest.mark.parametrize("world_size", [1, 2, 4, 30])
def test_evaluation_shows_every_sample_once_in_order(data: TarDataset, world_size: int) -> None:
    seen = list[int]()
    for rank in range(world_size):
        settings = LoaderSettings(image_size=16, channels=1, rank=rank, world_size=world_size)
        for indices, images in evaluation_batches(data, settings, batch_size=4):
            assert images.shape == (len(indices), 1, 16, 16)
            assert images.dtype == torch.float32
            seen += indices.tolist()
    assert seen == list(range(NUM_SAMPLES))


def test_no_augmentation_is_the_plain_image() -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    plain = augment_by_name("none")(image, sample_rng(0, 0, 0))
    assert np.array_equal(plain, to_pixels(image))
    assert plain.shape == (1, 8, 8)
    assert to_pixels(Image.new("L", (1, 1), 255)) == 1
    assert to_pixels(Image.new("L", (1, 1), 0)) == -1


def test_the_warp_moves_turns_and_scales_and_fills_with_the_background() -> None:
    image = Image.new("L", (32, 32), 200)
    image.paste(10, (12, 12, 20, 20))

    def warped(**ranges: float) -> np.ndarray:
        return Augment(**ranges)(image, sample_rng(1, 2, 3))[0]

    def dark(pixels: np.ndarray) -> np.ndarray:
        return np.argwhere(pixels < 0)

    still = dark(warped())
    moved = dark(warped(translate=0.3))
    assert np.abs(moved.mean(0) - still.mean(0)).max() > 1
    assert np.abs(moved.mean(0) - still.mean(0)).max() <= 0.3 * 32 + 1
    assert len(dark(warped(scale=0.5))) != len(still)
    assert np.abs(dark(warped(rotate_degrees=40)).mean(0) - still.mean(0)).max() < 0.6  # about the centre
    turned = warped(rotate_degrees=40, translate=0.3, shear=0.3)
    assert turned.max() == pytest.approx(200 / 127.5 - 1, abs=1e-6)  # no black or white in the corners
    assert (np.concatenate([turned[0], turned[-1], turned[:, 0], turned[:, -1]]) > 0.5).mean() > 0.9


def test_noise_has_at_most_the_requested_deviation() -> None:
    image = Image.new("L", (64, 64), 127)
    deviations = [Augment(noise=0.2)(image, sample_rng(0, 0, i)).std() for i in range(50)]
    assert max(deviations) <= 0.21
    assert max(deviations) > 0.15
    assert min(deviations) < 0.05


def test_the_background_is_the_middle_colour_of_the_corners() -> None:
    image = Image.new("L", (8, 8), 250)
    image.putpixel((0, 0), 0)  # ink in one corner does not count
    assert background(image) == 250
    colour = Image.new("RGB", (8, 8), (10, 20, 30))
    assert background(colour) == (10, 20, 30)
    assert LIGHT(colour, sample_rng(0, 0, 0)).shape == (3, 8, 8)


def test_random_numbers_of_samples_are_reproducible_and_unrelated() -> None:
    assert sample_rng(1, 2, 3).random() == sample_rng(1, 2, 3).random()
    assert sample_rng(0, 0, 0).random(2).tolist() == pytest.approx(REGRESSION, abs=1e-12)
    draws = {sample_rng(*key).random() for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1)]}
    assert len(draws) == 5
