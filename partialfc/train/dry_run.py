"""``partialfc train CONFIG --dry-run``: everything is built, nothing is computed, and the memory is told by part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from partialfc import models
from partialfc.config import Config, build_head, build_head_optimizer
from partialfc.data.dataset import read_index
from partialfc.errors import ConfigError
from partialfc.head.partition import ClassPartition
from partialfc.head.rate_schedule import largest_rate
from partialfc.models.live_bytes import peak_of_a_step
from partialfc.plan import backbone_memory
from partialfc.train.describe import memory_of_head, size

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Part:
    """A line of the table."""

    where: str
    what: str
    num_bytes: float
    note: str = ""


def dry_run(config: Config, ranks: int) -> list[str]:
    """Build backbone, head and optimizers without memory, as rank 0 of ``ranks``; a table of what they would take.

    Raises:
        ConfigError: there is neither a data set to count the classes of, nor ``data.num_classes``.
    """
    num_classes = count_classes(config)
    parts = [*_of_backbone(config, ranks), *_of_head(config, num_classes, ranks)]
    total = sum(part.num_bytes for part in parts)
    width = max(len(part.what) for part in parts)
    lines = [
        f"{config.model.name}, {num_classes:,} classes over {ranks} ranks, {config.engine.precision}, "
        f"global batch {config.data.global_batch_size:,}: memory of rank 0"
    ]
    before = ""
    for part in parts:
        where = part.where if part.where != before else ""
        before = part.where
        lines.append(f"  {where:<10}{part.what:<{width}}  {size(part.num_bytes):>11}  {part.note}".rstrip())
    rest = "workspaces of libraries, fragments and NCCL come on top"
    return [*lines, f"  {'total':<10}{'':<{width}}  {size(total):>11}  {rest}"]


def count_classes(config: Config) -> int:
    """Of the data set, if it is there, else as the config says."""
    if (config.data.train / "index.json").exists():
        found: int = read_index(config.data.train)["num_classes"]
        return found
    if config.data.num_classes is None:
        raise ConfigError(
            f"data.train: {config.data.train} is not there, and data.num_classes does not say how many classes it has"
        )
    return config.data.num_classes


def _of_backbone(config: Config, ranks: int) -> list[Part]:
    with torch.device("meta"):
        backbone = models.build(
            config.model.name,
            config.model.embedding_dim,
            config.data.channels,
            config.data.image_size,
            config.model.options,
            config.model.activation_checkpointing,
        )
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    lasting = backbone_memory(
        parameters,
        config.optim.name,
        momentum=config.optim.momentum > 0,
        precision=config.engine.precision,
        zero_stage=config.engine.zero_stage if config.engine.name == "deepspeed" else None,
        world_size=ranks,
    )
    batch = -(-config.data.global_batch_size // (ranks * config.optim.accumulation))
    shape = (batch, config.data.channels, config.data.image_size, config.data.image_size)
    peak = peak_of_a_step(backbone, shape, _DTYPES[config.engine.precision])
    notes = {"weights": f"{parameters / 1e6:,.1f} M parameters"}
    return [
        *(Part("backbone", what, num_bytes, notes.get(what, "")) for what, num_bytes in lasting.items()),
        Part("backbone", "activations", peak, f"{batch} images, peak of forward and backward"),
    ]


def _of_head(config: Config, num_classes: int, ranks: int) -> list[Part]:
    first, last = ClassPartition(num_classes, ranks).range(0)
    rows = last - first
    head = build_head(config, rows, device="meta")
    build_head_optimizer(config, head)
    rate = largest_rate(head.sample_rate)
    memory = memory_of_head(config, head)
    optim = config.optim.head_optimizer
    lasting = {
        "weights": (memory.weight, f"{rows:,} classes"),
        f"optimizer ({optim})": (memory.optimizer + memory.counter, ""),
        "centers": (memory.centers, ""),
    }
    gathered = config.data.global_batch_size // config.optim.accumulation * config.model.embedding_dim * 4
    # With a sample rate rows are gathered, with their gradient's values: at most so many take part.
    active = min(rows, round(rate * num_classes / ranks) + config.data.global_batch_size)
    notes = f"sample rate {rate:g}: up to {active:,} classes take part"
    return [
        *(Part("head", what, each * rows, note) for what, (each, note) in lasting.items() if each),
        Part("head", "rows' gradient", active * memory.active, notes),
        Part("head", "logits", head.memory_budget_mb * 2**20, "head.memory_budget_mb"),
        Part("head", "gathered batch", 3 * gathered, "embeddings of all ranks, their gradient, their message"),
    ]
