"""Batches of a data set folder, in the global order given by (seed, step)."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from partialfc.config import Config
from partialfc.data.augment import augment_by_name, sample_rng, to_pixels
from partialfc.data.dataset import TarDataset
from partialfc.data.order import batch_indices, local_slice, steps_per_epoch
from partialfc.errors import ConfigError, DataError

_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """Settings of a rank's loader; the ranks of a run differ in ``rank`` only."""

    global_batch_size: int  # samples of a training step, over all ranks
    image_size: int  # pixels; images of another size are resized
    channels: int  # 1 grey, 3 RGB; images are converted
    augment: str = "none"  # none, light or flip; an evaluation never augments
    seed: int = 0
    micro_batches: int = 1  # equal parts of each training batch, to be taken one after the other
    workers: int = 0  # decoding processes of this rank; 0 decodes in the training process
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.channels not in _MODES:
            raise ConfigError(f"channels must be 1 or 3, got {self.channels}")
        for name in ("global_batch_size", "image_size", "micro_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def from_config(cls, config: Config, rank: int, world_size: int) -> Self:
        """Return the settings of a run, on one of its ranks."""
        data = config.data
        return cls(
            global_batch_size=data.global_batch_size,
            image_size=data.image_size,
            channels=data.channels,
            augment=data.augment,
            seed=config.run.seed,
            micro_batches=config.optim.accumulation,
            workers=data.workers,
            rank=rank,
            world_size=world_size,
        )


class Batch(NamedTuple):
    """This rank's part of a global batch: always b = ceil(global batch size / world size) samples."""

    step: int
    images: Tensor  # [b, channels, image_size, image_size] float32 in [-1, 1]; zeros where padded
    labels: Tensor  # [b] int64; -1 where padded
    indices: Tensor  # [b] int64, sample indices of the data set; -1 where padded


class StepDataset(Dataset[Batch]):
    """Batches by step: item i is this rank's batch of step ``start_step + i``, the same in any process."""

    def __init__(self, dataset: TarDataset, settings: LoaderSettings, start_step: int, total_steps: int) -> None:
        self.dataset, self.settings = dataset, settings
        self.augment = augment_by_name(settings.augment)
        self.start_step, self.total_steps = start_step, total_steps

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __getitem__(self, i: int) -> Batch:
        if not 0 <= i < len(self):
            raise IndexError(i)
        settings, samples, step = self.settings, self.dataset.num_samples, self.start_step + i
        epoch = step // steps_per_epoch(samples, settings.global_batch_size)
        indices = batch_indices(
            step,
            samples,
            settings.global_batch_size,
            settings.seed,
            settings.rank,
            settings.world_size,
            settings.micro_batches,
        )
        images = np.zeros((len(indices), settings.channels, *[settings.image_size] * 2), dtype=np.float32)
        labels = np.full(len(indices), -1, dtype=np.int64)
        for slot, index in enumerate(indices.tolist()):
            if index >= 0:
                image = decode(self.dataset, index, settings.image_size, settings.channels)
                images[slot] = self.augment(image, sample_rng(settings.seed, epoch, index))
                labels[slot] = self.dataset.labels[index]
        return Batch(step, torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(indices))


def build_loader(dataset: TarDataset, settings: LoaderSettings, start_step: int, total_steps: int) -> DataLoader[Batch]:
    """Return a loader that yields a :class:`Batch` for every step from ``start_step`` to ``total_steps`` - 1.

    The batches do not depend on ``settings.workers``; those of all ranks together do not depend on the world size.

    Raises:
        ConfigError: ``settings.augment`` is unknown.
        DataError: the data set holds no samples; or, when iterating, a sample cannot be decoded.
    """
    _require_samples(dataset)
    # batch_size=None: an item is a whole batch, so workers pass a few large tensors instead of many small ones.
    return DataLoader(
        StepDataset(dataset, settings, start_step, total_steps),
        batch_size=None,
        num_workers=settings.workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
    )


@contextmanager
def running(loader: DataLoader[Batch]) -> Iterator[Iterator[Batch]]:
    """Iterate over a loader inside the context; end its processes on leaving it, also after an exception.

    The workers ignore SIGTERM, with which Python ends the children of an exiting process: it would wait forever.
    """
    batches = iter(loader)
    try:
        yield batches
    finally:
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            batches._shutdown_workers()  # else it lives as long as the traceback that refers to it


def evaluation_batches(
    dataset: TarDataset, settings: LoaderSettings, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over this rank's contiguous slice of the data set, without augmentation; together, the ranks cover every
    sample once.

    Args:
        batch_size: images of this rank at a time.

    Yields:
        indices: int64 [b], images: float32 [b, channels, image_size, image_size] in [-1, 1]; the last b may be smaller.

    Raises:
        DataError: the data set holds no samples; or, when iterating, a sample cannot be decoded.
    """
    _require_samples(dataset)
    samples = np.arange(*local_slice(dataset.num_samples, settings.rank, settings.world_size), dtype=np.int64)
    return sample_batches(dataset, samples, settings, batch_size)


def sample_batches(
    dataset: TarDataset, samples: npt.NDArray[np.int64], settings: LoaderSettings, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over ``samples [n]`` in their order, without augmentation; yields as :func:`evaluation_batches` does."""
    for start in range(0, len(samples), batch_size):
        indices = samples[start : start + batch_size]
        images = [decode(dataset, index, settings.image_size, settings.channels) for index in indices.tolist()]
        pixels = [to_pixels(image) for image in images]
        yield torch.from_numpy(indices), torch.from_numpy(np.stack(pixels))


def decode(dataset: TarDataset, index: int, image_size: int, channels: int) -> Image.Image:
    """Return sample ``index`` as a grey (1 channel) or RGB (3 channels) image of ``image_size`` pixels a side.

    Raises:
        DataError: it cannot be decoded; the message names shard, key and index.
    """
    data = dataset.read(index)
    try:
        # Untrusted data: Pillow may use only these decoders.
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as encoded:
            image = encoded.convert(_MODES[channels])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{dataset.describe(index)} cannot be decoded: {error}") from error
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return image


def _require_samples(dataset: TarDataset) -> None:
    if dataset.num_samples < 1:
        raise DataError(f"{dataset.folder} holds no samples")


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # there are as many workers as cores
    # A signal to the process group is for the rank to handle: it finishes its step and ends its workers.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
