"""Batches of a data set folder, in the global order given by (seed, step)."""

from __future__ import annotations

import signal
import traceback
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
from partialfc.data.decode import BadImage, open_image, require_plausible_size, to_8_bits
from partialfc.data.order import BatchOrder, local_slice
from partialfc.errors import ConfigError, DataUnavailable, InvalidData, PartialFCError

_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """Settings of a rank's loader; the ranks of a run differ in ``rank`` only."""

    image_size: int  # pixels; images of another size are resized
    channels: int  # 1 grey, 3 RGB; images are converted
    max_pixels: int = 40_000_000  # of an image as it is stored; a larger one is an error
    augment: str = "none"  # none, light or flip; an evaluation never augments
    micro_batches: int = 1  # equal parts of each training batch, to be taken one after the other
    workers: int = 0  # decoding processes of this rank; 0 decodes in the training process
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.channels not in _MODES:
            raise ConfigError(f"channels must be 1 or 3, got {self.channels}")
        for name in ("image_size", "max_pixels", "micro_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def from_config(cls, config: Config, rank: int, world_size: int) -> Self:
        """Return the settings of a run, on one of its ranks."""
        data = config.data
        return cls(
            image_size=data.image_size,
            channels=data.channels,
            max_pixels=data.max_pixels,
            augment=data.augment,
            micro_batches=config.optim.accumulation,
            workers=data.workers,
            rank=rank,
            world_size=world_size,
        )


class Batch(NamedTuple):
    """This rank's samples of a global batch, micro-batch by micro-batch; there may be none."""

    step: int
    images: Tensor  # [n, channels, image_size, image_size] float32 in [-1, 1]
    labels: Tensor  # [n] int64
    indices: Tensor  # [n] int64, of the data set
    counts: list[int]  # samples of each micro-batch on this rank; their sum is n
    counts_of_all_ranks: list[int]  # samples of each micro-batch over all ranks; none is 0


class StepDataset(Dataset[Batch | PartialFCError]):
    """Batches by step: item i is this rank's batch of step ``start_step + i``, the same in any process.

    An error is an item too: raised in a loader process, it would arrive as the text of that process's traceback.
    """

    def __init__(
        self, dataset: TarDataset, settings: LoaderSettings, order: BatchOrder, start_step: int, total_steps: int
    ) -> None:
        self.dataset, self.settings, self.order = dataset, settings, order
        self.augment = augment_by_name(settings.augment)
        self.start_step, self.total_steps = start_step, total_steps

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __getitem__(self, i: int) -> Batch | PartialFCError:
        if not 0 <= i < len(self):
            raise IndexError(i)
        try:
            return self._load(i)
        except PartialFCError as error:
            return error
        except Exception as error:
            traceback.print_exc()  # here it says where; what travels is one line
            return DataUnavailable(f"batch of step {self.start_step + i + 1}: {_in_one_line(error)}")

    def _load(self, i: int) -> Batch:
        settings, order, step = self.settings, self.order, self.start_step + i
        epoch, _ = order.place(step)
        parts = order.local_indices(step, settings.rank, settings.world_size, settings.micro_batches)
        indices = np.concatenate(parts)
        images = np.empty((len(indices), settings.channels, *[settings.image_size] * 2), dtype=np.float32)
        for slot, index in enumerate(indices.tolist()):
            image = decode(self.dataset, index, settings)
            images[slot] = self.augment(image, sample_rng(order.seed, epoch, index))
        return Batch(
            step,
            torch.from_numpy(images),
            torch.from_numpy(self.dataset.labels_of(indices)),
            torch.from_numpy(indices),
            [len(part) for part in parts],
            order.micro_batch_samples(step, settings.micro_batches),
        )


def build_loader(
    dataset: TarDataset, settings: LoaderSettings, order: BatchOrder, start_step: int, total_steps: int
) -> DataLoader[Batch | PartialFCError]:
    """Return a loader of a :class:`Batch` for every step from ``start_step`` to ``total_steps`` - 1; :func:`running`
    iterates over it.

    The batches do not depend on ``settings.workers``; those of all ranks together do not depend on the world size.

    Raises:
        ConfigError: ``settings.augment`` is unknown.
        InvalidData: the data set holds no samples.
    """
    require_samples(dataset)
    # batch_size=None: an item is a whole batch, so workers pass a few large tensors instead of many small ones.
    return DataLoader(
        StepDataset(dataset, settings, order, start_step, total_steps),
        batch_size=None,
        num_workers=settings.workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
    )


@contextmanager
def running(loader: DataLoader[Batch | PartialFCError]) -> Iterator[Iterator[Batch]]:
    """Iterate over a loader inside the context; end its processes on leaving it, also after an exception.

    The workers ignore SIGTERM, with which Python ends the children of an exiting process: it would wait forever.

    Raises:
        InvalidData: when iterating, a sample cannot be decoded.
        DataUnavailable: when iterating, a shard cannot be read, or a loader process has died.
    """
    items = iter(loader)
    try:
        yield _raise_errors(items)
    finally:
        if isinstance(items, _MultiProcessingDataLoaderIter):
            items._shutdown_workers()  # else it lives as long as the traceback that refers to it


def _raise_errors(items: Iterator[Batch | PartialFCError]) -> Iterator[Batch]:
    while True:
        try:
            item = next(items, None)
        except (RuntimeError, OSError, EOFError) as error:  # a process was killed, or shared memory is full
            raise DataUnavailable(
                f"loading failed: {_in_one_line(error)}; is the memory full, or /dev/shm? Lower data.workers"
            ) from error
        if isinstance(item, PartialFCError):
            raise item
        if item is None:
            return
        yield item


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


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
        InvalidData: the data set holds no samples; or, when iterating, a sample cannot be decoded.
        DataUnavailable: when iterating, a shard cannot be read.
    """
    require_samples(dataset)
    samples = np.arange(*local_slice(dataset.num_samples, settings.rank, settings.world_size), dtype=np.int64)
    return sample_batches(dataset, samples, settings, batch_size)


def sample_batches(
    dataset: TarDataset, samples: npt.NDArray[np.int64], settings: LoaderSettings, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over ``samples [n]`` in their order, without augmentation; yields as :func:`evaluation_batches` does."""
    for start in range(0, len(samples), batch_size):
        indices = samples[start : start + batch_size]
        images = [decode(dataset, index, settings) for index in indices.tolist()]
        pixels = [to_pixels(image) for image in images]
        yield torch.from_numpy(indices), torch.from_numpy(np.stack(pixels))


def decode(dataset: TarDataset, index: int, settings: LoaderSettings) -> Image.Image:
    """Return sample ``index`` as a grey (1 channel) or RGB (3 channels) image of ``image_size`` pixels a side.

    Raises:
        InvalidData: it cannot be decoded or is too large; the message names shard, key and index.
        DataUnavailable: its shard cannot be read.
    """
    image_size, most = settings.image_size, settings.max_pixels
    try:
        require_plausible_size(dataset.num_bytes(index), most)
        with open_image(dataset.read(index), most) as encoded:
            image = to_8_bits(encoded).convert(_MODES[settings.channels])
    except BadImage as error:
        raise InvalidData(f"{dataset.describe(index)} {error}") from error
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return image


def require_samples(dataset: TarDataset) -> None:
    """Raise InvalidData if a data set is empty."""
    if dataset.num_samples < 1:
        raise InvalidData(f"{dataset.folder} holds no samples")


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # there are as many workers as cores
    # A signal to the process group is for the rank to handle: it finishes its step and ends its workers.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
