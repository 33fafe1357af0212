"""Sample order, as pure functions.

Every rank computes its samples of a step from (seed, step) alone: nothing is shuffled in memory or stored, and the
global batch of a step is the same for every world size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from partialfc.config import Config
from partialfc.data.permutation import Indices, epoch_permutation
from partialfc.errors import ConfigError, DataError

LastBatch = Literal["drop", "keep", "wrap"]


def local_slice(global_batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the slice ``[start, stop)`` of a global batch that ``rank`` holds: ceil(B / W) samples.

    It is clipped to B: the last ranks may hold fewer samples, or none.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
    share = local_share(global_batch_size, 1, world_size)
    return min(rank * share, global_batch_size), min((rank + 1) * share, global_batch_size)


def local_share(global_batch_size: int, micro_batches: int, world_size: int) -> int:
    """Return the most samples of a micro-batch that a rank holds: ceil(P / W) of P = ceil(B / micro_batches)."""
    return -(-global_batch_size // (micro_batches * world_size))


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """The global batch of every step of a run, and all that is counted in batches, samples and epochs.

    Args:
        num_samples: of the data set.
        batch_size: samples of a global batch.
        last_batch: what the end of an epoch is, where it does not fill a batch: ``drop`` leaves its samples out, which
            differ from epoch to epoch; ``keep`` makes a short batch of them; ``wrap`` fills it up from the beginning of
            the epoch's order, with the same augmentation.
        seed: of the shuffles.
        first_step: step of the run at which batch 0 of epoch 0 would be. It is 0 unless the batches have changed in
            mid-run, and may be negative.

    Raises:
        ConfigError: there is no whole batch, and ``last_batch`` is drop.
        DataError: there are no samples at all.
    """

    num_samples: int
    batch_size: int
    last_batch: LastBatch = "drop"
    seed: int = 0
    first_step: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"data.global_batch_size must be at least 1, got {self.batch_size}")
        if self.num_samples < 1:
            raise DataError("the data set holds no samples")
        if self.num_samples < self.batch_size and self.last_batch == "drop":
            raise ConfigError(
                f"data.global_batch_size: {self.batch_size:,} samples, and the data set has {self.num_samples:,}: "
                "data.last_batch=drop leaves out all of them; lower the batch size, or choose data.last_batch=keep "
                "(a short batch) or wrap (samples repeat)"
            )

    @classmethod
    def from_config(cls, config: Config, num_samples: int) -> Self:
        """Return the order of a run that begins."""
        data = config.data
        return cls(
            num_samples=num_samples,
            batch_size=data.global_batch_size,
            last_batch=data.last_batch,
            seed=config.run.seed,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + bool(rest and self.last_batch != "drop")

    @property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch's batches, those that wrapping repeats included."""
        return self.num_samples if self.last_batch == "keep" else self.steps_per_epoch * self.batch_size

    def place(self, step: int) -> tuple[int, int]:
        """Return the epoch of ``step`` and the number of its batch in the epoch, both from 0."""
        return divmod(step - self.first_step, self.steps_per_epoch)

    def batch_samples(self, step: int) -> int:
        """Return the number of samples in the global batch of ``step``."""
        return min(self.batch_size, self.samples_per_epoch - self.place(step)[1] * self.batch_size)

    def samples_before(self, step: int) -> int:
        """Return the number of samples in the global batches from batch 0 of epoch 0 to the one before ``step``."""
        epoch, batch = self.place(step)
        return epoch * self.samples_per_epoch + batch * self.batch_size

    def micro_batch_samples(self, step: int, micro_batches: int) -> list[int]:
        """Return the number of samples of each micro-batch of ``step`` that has any, over all ranks."""
        samples, size = self.batch_samples(step), local_share(self.batch_size, micro_batches, 1)
        return [min(size, samples - start) for start in range(0, samples, size)]

    def local_indices(self, step: int, rank: int, world_size: int, micro_batches: int = 1) -> list[Indices]:
        """Return the sample indices of ``rank`` in each micro-batch of ``step`` that has samples on any rank.

        A global batch is split into ``micro_batches`` first, and each of these over the ranks: so a micro-batch holds
        the same samples at any world size. A rank has ceil(P / W) samples of a micro-batch of P, and where there are
        too few for all ranks, the last ranks have fewer, or none.
        """
        epoch, batch = self.place(step)
        size = local_share(self.batch_size, micro_batches, 1)
        start, stop = local_slice(size, rank, world_size)
        found = []
        for part, samples in enumerate(self.micro_batch_samples(step, micro_batches)):
            begin = batch * self.batch_size + part * size
            positions = np.arange(begin + min(start, samples), begin + min(stop, samples), dtype=np.int64)
            found.append(epoch_permutation(positions % self.num_samples, self.num_samples, self.seed, epoch))
        return found

    def continued(self, step: int, epoch: int, samples: int) -> Self:
        """Return the order in which ``step`` comes after the first ``samples`` of ``epoch``, rounded down to batches.

        Rounding down repeats fewer than a batch of them rather than leaving any out.
        """
        batches = min(samples // self.batch_size, self.steps_per_epoch)
        return replace(self, first_step=step - epoch * self.steps_per_epoch - batches)
