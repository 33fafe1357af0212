"""From a data set folder to batches, in the global order that (seed, step) fixes."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from partialfc.data.augment import Augment, augment_by_name, sample_rng, to_pixels
from partialfc.data.dataset import TarDataset
from partialfc.data.order import batch_indices, local_slice, steps_per_epoch
from partialfc.errors import ConfigError, DataError

_MODES = {1: "L", 3: "RGB"}


class Batch(NamedTuple):
    """This rank's share of a global batch: b = ceil(global batch size / world size) samples, always."""

    step: int
    images: Tensor  # [b, channels, image_size, image_size] float32 in [-1, 1]; zeros where padded
    labels: Tensor  # [b] int64; -1 where padded
    indices: Tensor  # [b] int64, sample indices of the data set; -1 where padded


class StepDataset(Dataset[Batch]):
    """Item i is the local batch of step ``start_step + i``: a pure function of the arguments, in any process."""

    def __init__(
        self,
        dataset: TarDataset,
        *,
        global_batch_size: int,
        image_size: int,
        channels: int,
        augment: Augment,
        seed: int,
        rank: int,
        world_size: int,
        start_step: int,
        total_steps: int,
        micro_batches: int = 1,
    ) -> None:
        self.micro_batches = micro_batches
        self.dataset, self.augment, self.seed = dataset, augment, seed
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self.image_size, self.channels = image_size, channels
        self.start_step, self.total_steps = start_step, total_steps

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __getitem__(self, i: int) -> Batch:
        if not 0 <= i < len(self):
            raise IndexError(i)
        step = self.start_step + i
        samples = self.dataset.num_samples
        epoch = step // steps_per_epoch(samples, self.global_batch_size)
        indices = batch_indices(
            step, samples, self.global_batch_size, self.seed, self.rank, self.world_size, self.micro_batches
        )
        images = np.zeros((len(indices), self.channels, self.image_size, self.image_size), dtype=np.float32)
        labels = np.full(len(indices), -1, dtype=np.int64)
        for slot, index in enumerate(indices.tolist()):
            if index >= 0:
                image = decode(self.dataset, index, self.image_size, self.channels)
                images[slot] = self.augment(image, sample_rng(self.seed, epoch, index))
                labels[slot] = self.dataset.labels[index]
        return Batch(step, torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(indices))


def build_loader(
    dataset: TarDataset,
    *,
    global_batch_size: int,
    image_size: int,
    channels: int,
    augment: str,
    seed: int,
    rank: int,
    world_size: int,
    workers: int,
    start_step: int,
    total_steps: int,
    micro_batches: int = 1,
) -> DataLoader[Batch]:
    """Yields a :class:`Batch` for every step from ``start_step`` up to, not including, ``total_steps``.

    The batches do not depend on ``workers``, and those of all ranks together do not depend on ``world_size``.

    Args:
        channels: 1 (grey) or 3 (RGB); images are converted.
        augment: ``none``, ``light`` or ``flip``.
        workers: decoding processes of this rank; 0 decodes in the training process.
        micro_batches: equal parts of each batch, to be taken one after the other.
    Raises:
        DataError: when iterating, for a sample that cannot be decoded: with its shard, key and index.
    """
    _check_sizes(dataset, image_size, channels, "global_batch_size", global_batch_size)
    steps = StepDataset(
        dataset,
        global_batch_size=global_batch_size,
        image_size=image_size,
        channels=channels,
        augment=augment_by_name(augment),
        seed=seed,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        total_steps=total_steps,
        micro_batches=micro_batches,
    )
    # batch_size=None: an item is a whole batch, so workers hand over a few large tensors instead of many small ones.
    return DataLoader(
        steps,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
    )


def evaluation_batches(
    dataset: TarDataset, *, image_size: int, channels: int, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's contiguous slice of the data set, in order, without augmentation; every sample once over all ranks.

    Yields:
        indices: int64 [b], images: float32 [b, channels, image_size, image_size] in [-1, 1]; the last b may be smaller.
    """
    samples = np.arange(*local_slice(dataset.num_samples, rank, world_size), dtype=np.int64)
    return plain_batches(dataset, samples, image_size=image_size, channels=channels, batch_size=batch_size)


def plain_batches(
    dataset: TarDataset, samples: npt.NDArray[np.int64], *, image_size: int, channels: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The ``samples [n]``, in order, without augmentation; yields as :func:`evaluation_batches` does."""
    _check_sizes(dataset, image_size, channels, "batch_size", batch_size)
    return _plain_batches(dataset, samples, image_size, channels, batch_size)


def _plain_batches(
    dataset: TarDataset, samples: npt.NDArray[np.int64], image_size: int, channels: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(samples), batch_size):
        indices = samples[start : start + batch_size]
        pixels = [to_pixels(decode(dataset, index, image_size, channels)) for index in indices.tolist()]
        yield torch.from_numpy(indices), torch.from_numpy(np.stack(pixels))


def decode(dataset: TarDataset, index: int, image_size: int, channels: int) -> Image.Image:
    """Sample ``index`` as a grey (1 channel) or RGB (3 channels) image of ``image_size`` × ``image_size`` pixels."""
    data = dataset.read(index)
    try:
        # Other formats are not offered to Pillow at all: its decoders are many, and data is not trusted.
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as encoded:
            image = encoded.convert(_MODES[channels])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{dataset.describe(index)} cannot be decoded: {error}") from error
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return image


def _check_sizes(dataset: TarDataset, image_size: int, channels: int, name: str, batch_size: int) -> None:
    if channels not in _MODES:
        raise ConfigError(f"channels must be 1 or 3, got {channels}")
    if image_size < 1 or batch_size < 1:
        raise ConfigError(f"image_size and {name} must be at least 1, got {image_size} and {batch_size}")
    if dataset.num_samples < 1:
        raise DataError(f"{dataset.folder} holds no samples")


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # as many workers as cores: more threads would only get in each other's way
    # A signal to the whole group of processes is for the rank to answer: it finishes its step, and ends its workers.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
