"""Lines that a run logs when it starts."""

from __future__ import annotations

from partialfc.config import Config
from partialfc.head import PartialFC
from partialfc.head.sample_rate import SampleRate, largest_rate
from partialfc.planning.memory import configured_head_memory, merging_copies, most_active_rows, slow_budget
from partialfc.tracking.console import format_bytes


def describe_memory(config: Config, head: PartialFC) -> str:
    """Return the memory of this rank's shard of the head."""
    rate = largest_rate(head.sample_rate)
    memory = configured_head_memory(config, head)
    classes = len(head.weight)
    rows = most_active_rows(classes, rate, config.data.global_batch_size) * (1 + merging_copies(config, head))
    step = rows * memory.active + head.memory_budget_mb * 2**20
    warning = slow_budget(config, classes)
    return (
        f"head memory: {memory.per_class:,} bytes per class, {format_bytes(classes * memory.per_class)} on rank 0; "
        f"a step at sample rate {rate:g} takes up to {format_bytes(step)} more"
        + (f"\nWARNING: {warning}" if warning else "")
    )


def describe_rate(sample_rate: SampleRate) -> str:
    """Return a sample rate or its schedule in words."""
    return repr(sample_rate) if callable(sample_rate) else f"{sample_rate:g}"
