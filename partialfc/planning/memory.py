"""Memory of head and backbone, calculated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from partialfc.config import Config
from partialfc.head import PartialFC
from partialfc.head.padded_rows import list_size
from partialfc.head.sample_rate import largest_rate

HeadOptimizer = Literal["sgd", "adamw", "adagrad"]
Precision = Literal["fp32", "bf16", "fp16"]
_FEWEST_AT_ONCE = 256  # classes; the head takes as many at least, where the budget allows
BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class HeadMemory:
    """Bytes per class, by part: permanent, and (``active``) while the class takes part in a step."""

    weight: int
    optimizer: int
    counter: int
    centers: int
    active: int

    @property
    def per_class(self) -> int:
        """Bytes of a class that does not take part in a step."""
        return self.weight + self.optimizer + self.counter + self.centers

    def total(self, num_classes: int, sample_rate: float, budget_mb: float = 256.0) -> float:
        """Return the bytes of a shard of ``num_classes`` at the peak of a step."""
        return num_classes * (self.per_class + sample_rate * self.active) + budget_mb * 2**20

    def largest_num_classes(self, num_bytes: float, sample_rate: float, budget_mb: float = 256.0) -> int:
        """Return the number of classes that fit in ``num_bytes``."""
        return max(0, int((num_bytes - budget_mb * 2**20) // (self.per_class + sample_rate * self.active)))


def head_memory(
    embedding_dim: int,
    optimizer: HeadOptimizer = "sgd",
    *,
    unsampled_rows: Literal["frozen", "decayed"] = "frozen",
    momentum: bool = True,
    weight_dtype: str = "float32",
    state_dtype: str | None = None,
    sub_centers: int = 1,
    class_bias: bool = False,
    center_loss: bool = False,
    sampled: bool = True,
) -> HeadMemory:
    """Return the bytes per class of a head.

    Args:
        embedding_dim: D.
        state_dtype: dtype of momentum or moments; default: ``weight_dtype``.
        sub_centers: weight rows per class, K.
        sampled: the sample rate is below 1, and a step gathers the active rows.
    """
    numbers = embedding_dim * sub_centers
    width = BYTES[state_dtype or weight_dtype]
    vectors = {"sgd": int(momentum), "adamw": 2, "adagrad": 0}[optimizer]
    counter = 4 if optimizer in ("adamw", "adagrad") or unsampled_rows == "decayed" else 0
    weight = numbers * BYTES[weight_dtype]
    state = numbers * vectors * width
    if class_bias:
        weight += 4
        state += (BYTES[state_dtype] if state_dtype else 4) * vectors
        counter *= 2
    # The rows' gradient in float32, their indices, and with sampling the indices of the sample.
    active = numbers * 4 + 8 + (8 if sampled else 0)
    return HeadMemory(weight, state, counter, embedding_dim * 4 if center_loss else 0, active)


def most_active_rows(classes: int, sample_rate: float, batch: int) -> int:
    """Return the most rows of a shard of ``classes`` that a step works on, given the samples of its global batch.

    Of a random sample it is an estimate, unless a GPU takes a list of a fixed length for it.
    """
    size = list_size(classes, sample_rate, batch)
    return min(classes, round(sample_rate * classes) + batch) if size is None else size.places


def merging_copies(config: Config, head: PartialFC) -> int:
    """Return the number of gradients of the rows that exist at once, beside the sum, while micro-batches are added."""
    if config.optim.accumulation == 1:
        return 0
    return 2 if largest_rate(head.sample_rate) < 1 else 1  # that of all rows is added in place


def configured_head_memory(config: Config, head: PartialFC) -> HeadMemory:
    """Return the bytes per class in a run of this config."""
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


def slow_budget(config: Config, num_classes: int) -> str:
    """Return a warning if ``head.memory_budget_mb`` holds few of a shard's classes at once; else an empty text."""
    batch = -(-config.data.global_batch_size // config.optim.accumulation)
    # Logits and their gradient of the whole batch; the classes' weights, copied and normalised.
    bytes_per_class = 4 * (2 * batch + 3 * config.model.embedding_dim)
    at_once = int(config.head.memory_budget_mb * 2**20 // bytes_per_class)
    wanted = min(_FEWEST_AT_ONCE, num_classes)
    if at_once >= wanted:
        return ""
    enough = -(-wanted * bytes_per_class // 2**20)
    return (
        f"head.memory_budget_mb={config.head.memory_budget_mb:g} holds the logits of about {max(1, at_once):,} classes "
        f"at once; matrix products so small are slow: {enough} or more"
    )


def backbone_memory(
    parameters: int,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    *,
    trainable: int | None = None,
    momentum: bool = True,
    precision: Precision = "fp32",
    zero_stage: int | None = None,
    world_size: int = 1,
) -> dict[str, int]:
    """Return the bytes per rank of a backbone's weights, gradients and optimizer state.

    Args:
        parameters: number of scalars.
        trainable: number of those that are not frozen; default: all.
        zero_stage: 0 to 3 under DeepSpeed; None for DistributedDataParallel, whose weights and gradients are float32
            in any precision.
    """
    vectors = {"sgd": int(momentum), "adamw": 2}[optimizer]
    trainable = parameters if trainable is None else trainable
    if zero_stage is None:
        return {"weights": 4 * parameters, "gradients": 4 * trainable, "optimizer": 4 * vectors * trainable}
    width = 4 if precision == "fp32" else 2
    master = 4 if precision != "fp32" or zero_stage > 0 else 0  # ZeRO updates a float32 copy of its part

    def share(of: int, from_stage: int) -> int:
        return -(-of // world_size) if zero_stage >= from_stage else of

    return {
        "weights": share(width * parameters, 3),
        "gradients": share(width * trainable, 2),
        "optimizer": share((master + 4 * vectors) * trainable, 1),
    }
