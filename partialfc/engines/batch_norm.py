"""Batch normalisation of batches whose sizes differ between ranks and steps."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from partialfc.errors import ConfigError

FEWEST_IMAGES = 2  # one image has no statistics of a batch


class BatchNormModes:
    """Chooses, for each batch, the statistics that the batch normalisations of ``module`` use.

    A batch of fewer than two images is normalised with the running statistics, which it leaves as they are. Images of
    this rank count; for SyncBatchNorm, whose statistics are of all ranks together, those of all ranks.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
        self._synchronised = [part for part in parts if isinstance(part, nn.SyncBatchNorm)]
        self._local = [part for part in parts if not isinstance(part, nn.SyncBatchNorm)]

    def choose(self, images: int, images_of_all_ranks: int) -> None:
        """Set the modes of a forward pass, and of its backward pass, which may repeat parts of it."""
        for parts, count in ((self._local, images), (self._synchronised, images_of_all_ranks)):
            for part in parts:
                part.training = count >= FEWEST_IMAGES

    def require_statistics(self, images: int, images_of_all_ranks: int) -> None:
        """Raise a ConfigError if even the largest batches of a run, of these sizes, have no statistics."""
        for parts, count, where in (
            (self._local, images, "a rank has"),
            (self._synchronised, images_of_all_ranks, "all ranks together have"),
        ):
            if parts and count < FEWEST_IMAGES:
                raise ConfigError(
                    f"data.global_batch_size: batch normalisation needs at least {FEWEST_IMAGES} images, but {where} "
                    f"{count} at a time; use a larger batch, fewer ranks or a smaller optim.accumulation"
                )
