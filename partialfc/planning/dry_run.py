"""``partialfc train CONFIG --dry-run``: build everything, compute nothing, and print the memory by part."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from partialfc import models
from partialfc.build.engine import require_trainable
from partialfc.build.head import build_head
from partialfc.build.optimizers import build_head_optimizer
from partialfc.config import Config, require_num_classes
from partialfc.data.class_table import require_class_table
from partialfc.data.dataset import TarDataset
from partialfc.data.index import CLASSES, checked_digest, find_shards, read_index
from partialfc.data.order import BatchOrder, local_share
from partialfc.data.plain import DataPath, describe, exists, set_folder
from partialfc.engines.base import DTYPES, require_used
from partialfc.engines.batch_norm import BatchNormModes
from partialfc.engines.deepspeed_config import deepspeed_options, loss_scale
from partialfc.errors import ConfigError
from partialfc.evaluate.runner import Evaluation
from partialfc.head.partition import ClassPartition
from partialfc.head.sample_rate import largest_rate
from partialfc.planning.activation_memory import peak_activation_bytes
from partialfc.planning.memory import (
    backbone_memory,
    configured_head_memory,
    merging_copies,
    most_active_rows,
    slow_budget,
)
from partialfc.tracking.console import console_progress, format_bytes


@dataclass(frozen=True)
class Part:
    """A line of the table."""

    owner: str  # backbone or head
    name: str
    num_bytes: float
    note: str = ""
    on_host: bool = False
    saved: bool = False  # in checkpoints


def dry_run(config: Config, ranks: int) -> list[str]:
    """Build backbone, head and optimizers without memory, as rank 0 of ``ranks``, and return a table of their memory.

    Raises:
        InvalidData: the training set exists, and it or an evaluation set is missing files or damaged.
        ConfigError: a run would not start with this config, as far as is known without ranks and devices, or the number
            of classes is unknown.
    """
    num_classes = count_classes(config)
    parts = [*_backbone_parts(config, ranks), *_head_parts(config, num_classes, ranks)]
    if config.checkpoint.asynchronous:
        copied = sum(part.num_bytes for part in parts if part.saved)
        parts.append(Part("host", "checkpoint", copied, "copy of the state, not in the total", on_host=True))
    total = sum(part.num_bytes for part in parts if not part.on_host)
    width = max(len(part.name) for part in parts)
    lines = [
        f"{config.model.name}, {num_classes:,} classes over {ranks} ranks, {config.engine.precision}, "
        f"global batch {config.data.global_batch_size:,}: memory of rank 0"
    ]
    previous = ""
    for part in parts:
        owner = part.owner if part.owner != previous else ""
        previous = part.owner
        lines.append(f"  {owner:<10}{part.name:<{width}}  {format_bytes(part.num_bytes):>11}  {part.note}".rstrip())
    note = "library workspaces, fragmentation and NCCL come on top"
    lines.append(f"  {'total':<10}{'':<{width}}  {format_bytes(total):>11}  {note}")
    warning = slow_budget(config, ClassPartition(num_classes, ranks).range(0)[1])
    if warning:
        lines.append(f"WARNING: {warning}")
    named: list[tuple[str, DataPath | None]] = [("data.train", config.data.train)]
    named += [("model.pretrained", config.model.pretrained)]
    named += [("evaluation.sets", folder) for folder in config.evaluation.sets]
    missing = [f"{key}={describe(path)}" for key, path in named if path is not None and not exists(path)]
    return [*lines, f"not there yet: {', '.join(missing)}"] if missing else lines


def count_classes(config: Config) -> int:
    """Return the number of classes of the data set, which is checked, or of the config where it does not exist yet."""
    if exists(config.data.train):
        return _check_data(config)
    if config.data.num_classes is None:
        name = describe(config.data.train)
        raise ConfigError(f"data.train: {name} does not exist; set data.num_classes to the number of its classes")
    return config.data.num_classes


def _check_data(config: Config) -> int:
    """Check the training set, all but the inside of its shards, and the evaluation sets; return the class count.

    Shards without ``index.json`` are indexed: nothing else tells their classes.
    """
    folder = set_folder(config.data.train)
    if folder is None:
        dataset = TarDataset(config.data.train, console_progress)
        num_classes, num_samples, table = dataset.num_classes, dataset.num_samples, dataset.class_table
    else:
        index = read_index(folder)
        num_classes, num_samples, table = index["num_classes"], index["num_samples"], folder / CLASSES
    require_num_classes(config, num_classes)
    if folder is not None:
        find_shards(folder, index)
        checked_digest(folder, index)
    require_class_table(table, num_classes)
    BatchOrder.from_config(config, num_samples)
    Evaluation(config).match_classes(num_classes, table)
    return num_classes


def _backbone_parts(config: Config, ranks: int) -> list[Part]:
    engine, dtype = config.engine, DTYPES[config.engine.precision]
    backbone = _build_without_memory(config)
    require_trainable(backbone, config)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    trainable = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    zero_stage, bucket, weight_dtype = None, 0, torch.float32
    if engine.name == "deepspeed":
        loss_scale(config)
        options = deepspeed_options(config, ranks, parameters)["zero_optimization"]
        zero_stage, weight_dtype = engine.zero_stage, dtype or torch.float32
        bucket = int(options["reduce_bucket_size"]) * weight_dtype.itemsize if zero_stage else 0
    constant = backbone_memory(
        parameters,
        config.optim.name,
        trainable=trainable,
        momentum=config.optim.momentum > 0,
        precision=engine.precision,
        zero_stage=zero_stage,
        world_size=ranks,
    )
    batch = local_share(config.data.global_batch_size, config.optim.accumulation, ranks)
    BatchNormModes(backbone).require_statistics(batch, batch)
    peak = _activation_bytes(config, backbone, batch, weight_dtype)
    if ranks > 1 and engine.name == "ddp":
        require_used(backbone, _has_gradient)
    parts = [Part("backbone", name, size, saved=name != "gradients") for name, size in constant.items()]
    frozen = 1 - trainable / parameters
    note = f"{parameters / 1e6:,.1f} M parameters" + (f", {frozen:.0%} of them frozen" if frozen > 0.005 else "")
    parts[0] = replace(parts[0], note=note)
    if engine.offload == "cpu":
        parts[-1] = replace(parts[-1], note="in host memory (engine.offload), not in the total", on_host=True)
    if bucket:
        parts.append(Part("backbone", "averaging", bucket, "bucket of gradients averaged over ranks"))
    return [*parts, Part("backbone", "activations", peak, f"{batch} images, peak of forward and backward")]


def _has_gradient(parameter: nn.Parameter) -> bool:
    """Return True if backward has added to the gradient, in place, since it was made."""
    return parameter.grad is not None and parameter.grad._version > 0


def _build_without_memory(config: Config) -> nn.Module:
    def build() -> nn.Module:
        return models.build(
            config.model.name,
            config.model.embedding_dim,
            config.data.channels,
            config.data.image_size,
            config.model.options,
            config.model.activation_checkpointing,
        )

    if not models.is_external(config.model.name):
        with torch.device("meta"):
            return build()
    return build().to("meta")  # its constructor may read values, which meta tensors do not have


def _activation_bytes(config: Config, backbone: nn.Module, batch: int, weight_dtype: torch.dtype) -> int:
    shape = (batch, config.data.channels, config.data.image_size, config.data.image_size)
    try:
        return peak_activation_bytes(backbone, shape, weight_dtype, DTYPES[config.engine.precision])
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"model.name: the memory of a step of {config.model.name} cannot be found without computing it ({reason})"
        ) from error


def _head_parts(config: Config, num_classes: int, ranks: int) -> list[Part]:
    first, last = ClassPartition(num_classes, ranks).range(0)
    rows = last - first
    head = build_head(config, rows, device="meta")
    build_head_optimizer(config, head)
    rate = largest_rate(head.sample_rate)
    memory = configured_head_memory(config, head)
    optim = config.optim.head_optimizer
    constant = {
        "weights": (memory.weight, f"{rows:,} classes"),
        f"optimizer ({optim})": (memory.optimizer + memory.counter, ""),
        "centers": (memory.centers, ""),
    }
    gathered = config.data.global_batch_size // config.optim.accumulation * config.model.embedding_dim * 4
    active = most_active_rows(rows, rate, config.data.global_batch_size)
    note = f"sample rate {rate:g}: up to {active:,} active rows"
    merged = merging_copies(config, head) * active * memory.active
    merging = [Part("head", "accumulation", merged, "gradients of the rows while those of micro-batches are added")]
    return [
        *(Part("head", name, each * rows, about, saved=True) for name, (each, about) in constant.items() if each),
        Part("head", "rows' gradient", active * memory.active, note),
        *(merging if merged else []),
        Part("head", "logits", head.memory_budget_mb * 2**20, "head.memory_budget_mb"),
        Part("head", "gathered batch", 3 * gathered, "embeddings of all ranks, their gradient, their message"),
    ]
