"""What a run says of itself when it starts."""

from __future__ import annotations

from partialfc.config import Config
from partialfc.head import PartialFC
from partialfc.head.sample_rate import SampleRate, largest_rate
from partialfc.planning.memory import HeadMemory, head_memory


def describe_memory(config: Config, head: PartialFC) -> str:
    """What the head takes on this rank."""
    rate = largest_rate(head.sample_rate)
    memory = memory_of_head(config, head)
    classes = len(head.weight)
    step = memory.total(classes, rate, head.memory_budget_mb) - classes * memory.per_class
    return (
        f"head memory: {memory.per_class:,} bytes a class, {size(classes * memory.per_class)} on rank 0; "
        f"a step at sample rate {rate:g} takes up to {size(step)} more"
    )


def memory_of_head(config: Config, head: PartialFC) -> HeadMemory:
    """What a class costs in a run of this config."""
    return head_memory(
        head.embedding_dim,
        config.optim.head_optimizer,
        unsampled_rows=config.optim.unsampled_rows,
        momentum=config.optim.momentum > 0,
        weight_dtype=config.head.weight_dtype,
        state_dtype=config.optim.head_state_dtype,
        sub_centers=head.loss.sub_centers or 1,
        class_bias=head.loss.class_bias,
        center_loss=head.center_loss is not None,
        sampled=largest_rate(head.sample_rate) < 1,
    )


def describe_rate(sample_rate: SampleRate) -> str:
    return repr(sample_rate) if callable(sample_rate) else f"{sample_rate:g}"


def size(num_bytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:,.1f} {unit}"
