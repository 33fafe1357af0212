"""Initial weights of classes that are added to a trained head."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partialfc.config import Config
from partialfc.data.dataset import TarDataset
from partialfc.data.loader import LoaderSettings, sample_batches
from partialfc.data.order import local_slice
from partialfc.head import PartialFC
from partialfc.runtime.process import ProcessContext
from partialfc.tracking.console import console_progress, no_progress

_ELEMENTS = 1 << 22  # elements of the sums exchanged at once


@torch.no_grad()
def start_at_mean_embeddings(
    config: Config, process: ProcessContext, dataset: TarDataset, backbone: nn.Module, head: PartialFC, first_class: int
) -> None:
    """Rotate the weights of the new classes, ``first_class`` and up, to the mean of their samples' unit embeddings.

    Weights keep their initial length, which sets the size of their first steps. With sub-centers, only the first is
    rotated. The centers of a center loss are set to the mean of the embeddings themselves. A class without samples
    keeps its random weight. A collective: the ranks share the embedding, whichever rank owns the classes.

    Args:
        backbone: in evaluation mode.
    """
    new = np.flatnonzero(dataset.labels >= first_class)
    new = new[np.argsort(dataset.labels[new], kind="stable")]
    labels = dataset.labels[new]
    settings = LoaderSettings.from_config(config, process.rank, process.world_size)
    block = max(1, _ELEMENTS // head.embedding_dim)
    progress = console_progress if process.is_first else no_progress
    with progress("embedding new classes", len(new)) as advance:
        for first in range(first_class, dataset.num_classes, block):
            last = min(first + block, dataset.num_classes)
            start, stop = np.searchsorted(labels, [first, last]).tolist()
            sums = torch.zeros(2, last - first, head.embedding_dim, dtype=torch.float64, device=process.device)
            mine = slice(*(start + edge for edge in local_slice(stop - start, process.rank, process.world_size)))
            for indices, images in sample_batches(dataset, new[mine], settings, config.evaluation.batch_size):
                rows = torch.from_numpy(dataset.labels[indices.numpy()] - first).to(process.device)
                embeddings = backbone(images.to(process.device, non_blocking=True)).double()
                sums[0].index_add_(0, rows, F.normalize(embeddings))
                sums[1].index_add_(0, rows, embeddings)
            counts = torch.from_numpy(np.bincount(labels[start:stop] - first, minlength=last - first))
            _set_rows(head, first, head.collectives.sum(sums), counts.to(process.device))
            advance(stop - start)


def _set_rows(head: PartialFC, first: int, sums: Tensor, counts: Tensor) -> None:
    """Set this rank's rows of the n classes from ``first`` on; ``sums`` [2, n, D] are over ``counts`` [n] samples."""
    ids = torch.arange(first, first + len(counts), device=counts.device)
    mine = (ids >= head.first_class) & (ids < head.first_class + len(head.weight)) & (counts > 0)
    rows = ids[mine] - head.first_class
    means = sums[:, mine] / counts[mine, None]
    weight = head.weight if head.loss.sub_centers is None else head.weight[:, 0]
    length = weight[rows].double().norm(dim=1, keepdim=True)
    weight[rows] = (F.normalize(means[0]) * length).to(weight.dtype)
    if head.center_loss is not None:
        head.center_loss.centers[rows] = means[1].to(head.center_loss.centers.dtype)
