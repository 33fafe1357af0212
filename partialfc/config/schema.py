"""The configuration tree: one YAML file, overridden by ``section.key=value`` on the command line.

Every key has a type, a default, a range and one line of documentation. Unknown keys are refused with the nearest name.
A config sets the *global* batch; the launcher chooses the number of ranks, which changes no result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from partialfc import losses
from partialfc.config.keys import takes

_MANY = 10**10  # of steps or classes: more is a mistake, and some library's integers end not far above


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _require_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a truth value, which counts as 1 or 0, where a number is expected."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and takes(annotation, int, float) and not takes(annotation, bool):
            raise PydanticCustomError("number", "expected a number")
        return value


class RunConfig(Section):
    """Folder, seed and supervision of a run."""

    dir: Path = Field(Path("runs/run"), description="run folder: metrics, checkpoints, figures")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of weights, sample order, augmentation and negatives")
    deterministic: bool = Field(
        False, description="the same bits in every run with the same ranks on the same kind of device; slower on GPUs"
    )
    timeout: float = Field(120.0, gt=0, le=1e6, description="seconds after which a silent rank ends the run")
    skipped_in_a_row: int = Field(10, ge=1, le=_MANY, description="skipped steps in a row that end the run")
    restarts_without_progress: int = Field(
        3, ge=0, le=_MANY, description="automatic restarts in a row from the same step before the run is given up"
    )


class DataConfig(Section):
    """Data set and loading."""

    train: Path | list[Path] = Field(
        description="data set folder, or WebDataset shards of one set: their folder, a pattern, a list"
    )
    num_classes: int | None = Field(
        None, ge=1, le=_MANY, description="number of classes that the data set must have; null: any"
    )
    global_batch_size: int = Field(256, ge=1, le=1 << 24, description="samples per step, over all ranks")
    last_batch: Literal["drop", "keep", "wrap"] = Field(
        "drop", description="end of an epoch that fills no batch: left out, a short batch, or filled from its beginning"
    )
    image_size: int = Field(32, ge=8, le=1024, description="pixels; images of other sizes are resized")
    channels: Literal[1, 3] = Field(1, description="1 grey, 3 RGB")
    max_pixels: int = Field(
        40_000_000,
        ge=1,
        le=178_956_970,
        description="largest stored image; its decoding takes memory",
    )
    augment: Literal["none", "light", "flip"] = Field(
        "light", description="light: random affine maps and noise; flip: random mirroring, usual for faces"
    )
    workers: int = Field(0, ge=0, le=256, description="loader processes per rank; 0 loads in the training process")

    @field_validator("train", mode="before")
    @classmethod
    def _require_paths(cls, value: Any) -> Any:
        paths = value if isinstance(value, list) else [value]
        if not paths or not all(isinstance(path, (str, Path)) for path in paths):
            raise PydanticCustomError("paths", "expected a path, or a list of paths")
        return value


class ModelConfig(Section):
    """Backbone."""

    name: str = Field("glyph_net", description="backbone: a name of this package, my.module:factory, or timm:NAME")
    embedding_dim: int = Field(128, ge=2, le=65536, description="dimension D of the embeddings")
    options: dict[str, Any] = Field({}, description="further parameters of the backbone, e.g. {drop_path: 0.2}")
    pretrained: Path | None = Field(None, description="weights that the backbone starts from: .pth, .pt, .safetensors")
    activation_checkpointing: bool = Field(False, description="recompute blocks in backward, to save memory")
    channels_last: Literal[True, False, "auto"] = Field(
        "auto", description="layout of convolutions; auto: True on GPUs"
    )


class LossConfig(BaseModel):
    """Name and parameters of a loss."""

    model_config = ConfigDict(extra="allow")
    name: str = Field("arcface", description="loss, one of " + ", ".join(losses.BY_NAME))


class CenterLossConfig(Section):
    """Center loss."""

    weight: float = Field(0.003, ge=0, le=1e6, description="λ of L = L_s + λ·L_c")
    alpha: float = Field(0.5, ge=0, le=1, description="learning rate of the centers")


class SampleRateConfig(Section):
    """Schedule of the sample rate."""

    schedule: Literal["steps", "linear"] = Field("linear", description="constant between epochs, or linear")
    rates: list[float] = Field([0.1, 1.0], min_length=2, description="sample rates, each in (0, 1]")
    epochs: list[Annotated[float, Field(ge=0, le=1e6)]] = Field(
        [0.0, 10.0], min_length=2, description="epochs at which the rates are reached; the first is 0"
    )


class HeadConfig(Section):
    """Sharded classifier."""

    loss: LossConfig = Field(LossConfig(), description="loss and its parameters")
    sample_rate: float = Field(1.0, gt=0, le=1, description="share of the classes drawn as negatives in a step")
    sample_rate_schedule: SampleRateConfig | None = Field(None, description="a changing rate, instead of sample_rate")
    filter_threshold: float | None = Field(None, ge=-1, le=1, description="negatives with a larger cosine are left out")
    correct_sampling: bool = Field(False, description="weight drawn classes by 1/sample_rate in the denominator")
    center_loss: CenterLossConfig | None = Field(None, description="center loss beside the softmax loss")
    weight_dtype: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: stochastic rounding")
    matmul_precision: Literal["highest", "exact", "fast"] | None = Field(
        None, description="precision of logits and gradients; null: exact on NVIDIA GPUs from Ampere on, else highest"
    )
    memory_budget_mb: float = Field(
        256.0, gt=0, le=1 << 24, description="MiB for the logits of a step; too few cost speed"
    )


class SpikeConfig(Section):
    """Definition of a loss spike."""

    factor: float = Field(3.0, gt=1, le=1e6, description="a loss above this multiple of its running mean is a spike")
    window: int = Field(100, ge=1, le=_MANY, description="steps of the running mean")


class OptimConfig(Section):
    """Optimizers of backbone and head, and their schedule."""

    name: Literal["sgd", "adamw"] = Field("sgd", description="SGD with momentum, or AdamW")
    head: Literal["same", "sgd", "adamw", "adagrad"] = Field("same", description="head optimizer; adagrad: row-wise")
    head_state_dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the head's moments")
    lr: float = Field(0.1, ge=0, le=1e30, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of both optimizers")
    weight_decay: float = Field(5e-4, ge=0, le=1e6, description="weight decay of both optimizers")
    epochs: float = Field(10.0, gt=0, le=1e6, description="length of the run; may be a fraction")
    schedule: Literal["constant", "cosine", "polynomial"] = Field("polynomial", description="decay after the warm-up")
    power: float = Field(2.0, gt=0, le=1e3, description="power of the polynomial decay")
    warmup: float = Field(1.0, ge=0, le=1e6, description="epochs of the linear rise from zero; at most optim.epochs")
    clip: float | None = Field(
        5.0, gt=0, le=1e30, description="largest norm of the backbone's gradient; null: no clipping"
    )
    head_lr_factor: float = Field(1.0, gt=0, le=1e6, description="ratio of the head's learning rate to the backbone's")
    unsampled_rows: Literal["frozen", "decayed"] = Field(
        "frozen", description="head rows without a gradient: unchanged, or exactly as under dense SGD"
    )
    accumulation: int = Field(1, ge=1, le=1 << 24, description="micro-batches into which a global batch is split")
    spike: SpikeConfig | None = Field(
        None, description="roll back to the last checkpoint after a loss spike, and continue with the next samples"
    )

    @property
    def head_optimizer(self) -> Literal["sgd", "adamw", "adagrad"]:
        """Name of the head's optimizer."""
        return self.name if self.head == "same" else self.head


class EngineConfig(Section):
    """Engine that updates the backbone."""

    name: Literal["ddp", "deepspeed"] = Field("ddp", description="engine of the backbone: torch alone, or DeepSpeed")
    zero_stage: int = Field(
        1, ge=0, le=3, description="split over DeepSpeed's ranks: 1 optimizer state, 2 also gradients, 3 also weights"
    )
    offload: Literal["none", "cpu"] = Field(
        "none", description="cpu: optimizer state in host memory, with deepspeed at zero_stage 1 to 3"
    )
    deepspeed_config: Path | None = Field(None, description="DeepSpeed JSON with options that this config lacks")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="precision of the backbone; fp16 scales the loss dynamically"
    )
    compile: bool = Field(False, description="torch.compile the backbone; the first step takes longer")
    sync_batchnorm: Literal[True, False, "auto"] = Field(
        False, description="batch statistics over all ranks' images, on GPUs only; auto: on GPUs"
    )


class EvaluationConfig(Section):
    """Evaluation sets."""

    sets: list[Path] = Field(
        [], description="folders: verification (with protocol.json or pairs.csv) or samples of known classes"
    )
    every: int = Field(0, ge=0, le=_MANY, description="steps between evaluations; 0: only at the end")
    batch_size: int = Field(256, ge=1, le=1 << 24, description="images embedded at once per rank")


class CheckpointConfig(Section):
    """Checkpoints, and resuming from them."""

    every: int = Field(1000, ge=0, le=_MANY, description="steps between checkpoints; 0: only at the end")
    keep_last: int = Field(2, ge=1, le=_MANY, description="number of newest checkpoints to keep")
    keep_every: int = Field(0, ge=0, le=_MANY, description="keep checkpoints at multiples of this step, too; 0: none")
    asynchronous: bool = Field(True, description="write in the background, from a copy in host memory")
    grow: bool = Field(False, description="resume with new classes after those of the checkpoint")
    grow_init: Literal["random", "embedding"] = Field(
        "random", description="weights of new classes: random, or the mean embedding of their samples"
    )
    resume: Literal["auto", "never"] = Field("auto", description="auto: resume from the run folder's newest valid one")


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["disabled", "auto", "online", "offline"] = Field(
        "disabled", description="auto: WANDB_MODE if set, else online where there is a key, else offline"
    )
    project: str = Field("partialfc", min_length=1, max_length=128, description="W&B project")
    entity: str | None = Field(None, min_length=1, description="user or team; null: the default of the API key")
    name: str | None = Field(None, min_length=1, max_length=128, description="name of the run; null: the run folder's")
    group: str | None = Field(None, min_length=1, max_length=128, description="runs that W&B shows together")
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field([], description="tags of the run")
    timeout: float = Field(30.0, gt=0, le=3600, description="seconds to wait for W&B, at the start and at the end")
    system_metrics: bool = Field(False, description="also log CPUs, GPUs, memory and disks of rank 0's host")


class TrackingConfig(Section):
    """Metrics and where they go."""

    log_every: int = Field(20, ge=1, le=_MANY, description="steps between lines of metrics.jsonl")
    metrics_port: int = Field(0, ge=0, le=65535, description="loopback port of /healthz and /metrics; 0: none")
    wandb: WandbConfig = Field(WandbConfig(), description="Weights & Biases, beside metrics.jsonl")


class Config(Section):
    """A run."""

    run: RunConfig = Field(RunConfig(), description="folder, seed and supervision of the run")
    data: DataConfig = Field(description="data set and loading")
    model: ModelConfig = Field(ModelConfig(), description="the backbone")
    head: HeadConfig = Field(HeadConfig(), description="the sharded classifier")
    optim: OptimConfig = Field(OptimConfig(), description="optimizers and their schedule")
    engine: EngineConfig = Field(EngineConfig(), description="engine and precision of the backbone")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="evaluations")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="checkpoints, and resuming from them")
    tracking: TrackingConfig = Field(TrackingConfig(), description="metrics and Weights & Biases")
