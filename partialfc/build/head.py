"""The head of a run."""

from __future__ import annotations

from typing import Any, Literal

import torch

from partialfc.config import Config, build_loss, build_sample_rate
from partialfc.head import CenterLoss, PartialFC


def build_head(
    config: Config,
    num_classes: int,
    steps_per_epoch: int = 1000,
    device: Any = None,
    on_nonfinite: Literal["raise", "propagate"] = "raise",
) -> PartialFC:
    """Build this rank's shard of the head.

    Args:
        steps_per_epoch: converts the epochs of a sample rate's schedule to steps.
        on_nonfinite: as in :class:`PartialFC`.
    """
    head = config.head
    return PartialFC(
        num_classes,
        config.model.embedding_dim,
        build_loss(head.loss),
        sample_rate=build_sample_rate(head, steps_per_epoch),
        seed=config.run.seed,
        center_loss=CenterLoss(head.center_loss.weight, head.center_loss.alpha) if head.center_loss else None,
        filter_threshold=head.filter_threshold,
        correct_sampling=head.correct_sampling,
        on_nonfinite=on_nonfinite,
        weight_dtype=getattr(torch, head.weight_dtype),
        matmul_precision=head.matmul_precision,
        memory_budget_mb=head.memory_budget_mb,
        device=device,
    )
