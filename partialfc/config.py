"""The configuration tree: one YAML file, overridden by ``section.key=value`` on the command line.

Every key has a type, a default, a range and one line of documentation. Unknown keys are refused with the nearest name.
A config names the *global* batch; how many ranks share it is the launcher's business and changes no result.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from partialfc import losses, models
from partialfc.errors import ConfigError
from partialfc.head import CenterLoss, LinearRate, PartialFC, RowAdagrad, RowAdamW, RowSGD, StepRate
from partialfc.head.rate_schedule import SampleRate
from partialfc.head.row_optim import RowOptimizer
from partialfc.options import like_default, unknown_name


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class RunConfig(Section):
    dir: Path = Field(Path("runs/run"), description="run folder: metrics, checkpoints, figures")
    seed: int = Field(0, ge=0, lt=2**31, description="of weights, sample order, augmentation and negatives")
    timeout: float = Field(120.0, gt=0, description="seconds after which a silent rank ends the run")
    skipped_in_a_row: int = Field(10, ge=1, description="skipped steps in a row that end the run")
    restarts_without_progress: int = Field(
        3, ge=0, description="automatic restarts in a row from the same step before the run is given up"
    )


class DataConfig(Section):
    train: Path = Field(description="data set folder with index.json")
    num_classes: int | None = Field(None, ge=1, description="what the data set must have; null: whatever it has")
    global_batch_size: int = Field(256, ge=1, description="samples a step, over all ranks")
    image_size: int = Field(32, ge=8, le=1024, description="pixels; images of another size are resized")
    channels: Literal[1, 3] = Field(1, description="1 grey, 3 RGB")
    augment: Literal["none", "light", "flip"] = Field(
        "light", description="light: random affine maps and noise; flip: mirrored at random, as is usual for faces"
    )
    workers: int = Field(0, ge=0, le=256, description="loader processes a rank; 0 loads in the training process")


class ModelConfig(Section):
    name: str = Field("glyph_net", description="backbone: one of ours, my.module:factory, or timm:NAME")
    embedding_dim: int = Field(128, ge=2, le=65536, description="D")
    options: dict[str, Any] = Field({}, description="what the backbone takes besides, e.g. {drop_path: 0.2}")
    pretrained: Path | None = Field(None, description="weights that the backbone begins with: .pth, .pt, .safetensors")
    activation_checkpointing: bool = Field(False, description="compute blocks again in backward, to save memory")
    channels_last: Literal[True, False, "auto"] = Field("auto", description="layout of convolutions; auto: on GPUs")


class LossConfig(BaseModel):
    """``name`` and whatever that loss takes."""

    model_config = ConfigDict(extra="allow")
    name: str = Field("arcface", description="loss, one of " + ", ".join(losses.BY_NAME))


class CenterLossConfig(Section):
    weight: float = Field(0.003, ge=0, description="λ of L = L_s + λ·L_c")
    alpha: float = Field(0.5, ge=0, le=1, description="learning rate of the centers")


class SampleRateConfig(Section):
    schedule: Literal["steps", "linear"] = Field("linear", description="each rate at once, or linear between two")
    rates: list[float] = Field([0.1, 1.0], min_length=2, description="sample rates, each in (0, 1]")
    epochs: list[float] = Field(
        [0.0, 10.0], min_length=2, description="epochs at which they are reached; the first is 0"
    )


class HeadConfig(Section):
    loss: LossConfig = Field(LossConfig(), description="loss and its parameters")
    sample_rate: float = Field(1.0, gt=0, le=1, description="share of the classes drawn as negatives in a step")
    sample_rate_schedule: SampleRateConfig | None = Field(None, description="a sample rate that changes, instead")
    filter_threshold: float | None = Field(None, ge=-1, le=1, description="negatives with a cosine above are left out")
    correct_sampling: bool = Field(False, description="weight drawn classes by 1/sample_rate in the denominator")
    center_loss: CenterLossConfig | None = Field(None, description="center loss beside the softmax loss")
    weight_dtype: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16 is rounded stochastically")
    memory_budget_mb: float = Field(256.0, gt=0, description="MiB for logits within a step")


class SpikeConfig(Section):
    factor: float = Field(3.0, gt=1, description="a loss above so many times its running mean is a spike")
    window: int = Field(100, ge=1, description="steps over which the mean is taken")


class OptimConfig(Section):
    name: Literal["sgd", "adamw"] = Field("sgd", description="SGD with momentum, or AdamW")
    head: Literal["same", "sgd", "adamw", "adagrad"] = Field("same", description="the head's; adagrad: row-wise")
    head_state_dtype: Literal["float32", "bfloat16"] = Field("float32", description="momentum or moments of the head")
    lr: float = Field(0.1, ge=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of both optimizers")
    weight_decay: float = Field(5e-4, ge=0, description="of both optimizers")
    epochs: float = Field(10.0, gt=0, description="length of the run; fractions are allowed")
    schedule: Literal["constant", "cosine", "polynomial"] = Field("polynomial", description="decay after the warm-up")
    power: float = Field(2.0, gt=0, description="of the polynomial decay")
    warmup: float = Field(1.0, ge=0, description="epochs over which the learning rate rises linearly from zero")
    clip: float | None = Field(5.0, gt=0, description="largest norm of the backbone's gradient; null: no clipping")
    head_lr_factor: float = Field(1.0, gt=0, description="the head's learning rate over the backbone's")
    unsampled_rows: Literal["frozen", "decayed"] = Field(
        "frozen", description="head rows without a gradient: as they are, or exactly as dense SGD would have them"
    )
    accumulation: int = Field(1, ge=1, description="micro-batches that a global batch is cut into")
    spike: SpikeConfig | None = Field(
        None, description="after a jump of the loss go back to the last checkpoint, with the next samples"
    )

    @property
    def head_optimizer(self) -> Literal["sgd", "adamw", "adagrad"]:
        """The head's optimizer by name."""
        return self.name if self.head == "same" else self.head


class EngineConfig(Section):
    name: Literal["ddp", "deepspeed"] = Field("ddp", description="who updates the backbone: torch alone, or DeepSpeed")
    zero_stage: int = Field(
        1, ge=0, le=3, description="of deepspeed, split over ranks: 1 optimizer state, 2 gradients too, 3 weights too"
    )
    offload: Literal["none", "cpu"] = Field(
        "none", description="cpu: optimizer state in host memory; of deepspeed at zero_stage 1 to 3"
    )
    deepspeed_config: Path | None = Field(None, description="a DeepSpeed JSON, for what this config leaves open")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the backbone's arithmetic; fp16 scales the loss dynamically"
    )
    compile: bool = Field(False, description="torch.compile the backbone; the first step takes longer")
    sync_batchnorm: Literal[True, False, "auto"] = Field(
        "auto", description="batch statistics over all ranks; GPUs only; auto: there"
    )


class EvaluationConfig(Section):
    sets: list[Path] = Field([], description="folders: verification (with protocol.json) or labelled known classes")
    every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    batch_size: int = Field(256, ge=1, description="images a rank embeds at once")


class CheckpointConfig(Section):
    every: int = Field(1000, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: int = Field(2, ge=1, description="how many of the newest to keep")
    keep_every: int = Field(0, ge=0, description="steps whose multiples are kept besides; 0: none")
    asynchronous: bool = Field(True, description="write while training goes on, from a copy in host memory")
    grow: bool = Field(False, description="go on with classes that the checkpoint does not have, added after its own")
    grow_init: Literal["random", "embedding"] = Field(
        "random", description="weights of new classes: drawn, or the mean embedding of their samples"
    )
    resume: Literal["auto", "never"] = Field("auto", description="auto: go on from the run folder's newest whole one")


class WandbConfig(Section):
    mode: Literal["disabled", "auto", "online", "offline"] = Field(
        "disabled", description="auto: WANDB_MODE if set, else online where there is a key, else offline"
    )
    project: str = Field("partialfc", min_length=1, max_length=128, description="W&B project")
    entity: str | None = Field(None, min_length=1, description="user or team; null: the key's own")
    name: str | None = Field(None, min_length=1, max_length=128, description="of the run; null: the run folder's name")
    group: str | None = Field(None, min_length=1, max_length=128, description="runs that W&B shows together")
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field([], description="labels to find the run by")
    timeout: float = Field(30.0, gt=0, le=3600, description="seconds to wait for W&B, at the start and at the end")
    system_metrics: bool = Field(False, description="also the use of CPUs, GPUs, memory and disks on rank 0's host")


class TrackingConfig(Section):
    log_every: int = Field(20, ge=1, description="steps between lines of metrics.jsonl")
    metrics_port: int = Field(0, ge=0, le=65535, description="loopback port of /healthz and /metrics; 0: none")
    wandb: WandbConfig = Field(WandbConfig(), description="Weights & Biases, beside metrics.jsonl")


class Config(Section):
    run: RunConfig = Field(RunConfig(), description="where, and from which seed")
    data: DataConfig = Field(description="what to train on")
    model: ModelConfig = Field(ModelConfig(), description="the backbone")
    head: HeadConfig = Field(HeadConfig(), description="the sharded classifier")
    optim: OptimConfig = Field(OptimConfig(), description="how to optimise")
    engine: EngineConfig = Field(EngineConfig(), description="how a step is computed")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="how to measure")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="what to keep of it, and how to go on")
    tracking: TrackingConfig = Field(TrackingConfig(), description="what to write down")


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as ``optim.lr=0.2``.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, of the wrong type or out of range.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `data:`, got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a tree of plain values."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from None
    models.check(config.model.name, config.model.options, config.model.activation_checkpointing)
    build_loss(config.head.loss)
    build_sample_rate(config.head, steps_per_epoch=1000)
    if config.optim.unsampled_rows == "decayed" and config.optim.head_optimizer != "sgd":
        raise ConfigError("optim.unsampled_rows: decayed needs the head's optimizer to be sgd (optim.head)")
    _check_engine(config.engine)
    return config


def require_num_classes(config: Config, found: int) -> None:
    """Compare the classes of the data set with ``data.num_classes``.

    Raises:
        ConfigError: they differ.
    """
    expected = config.data.num_classes
    if expected not in (None, found):
        raise ConfigError(f"data.num_classes: {expected:,} expected, and {config.data.train} has {found:,}")


def _check_engine(engine: EngineConfig) -> None:
    on_deepspeed = engine.name == "deepspeed"
    if engine.deepspeed_config is not None and not on_deepspeed:
        raise ConfigError("engine.deepspeed_config needs engine.name=deepspeed")
    if engine.offload == "cpu" and not (on_deepspeed and engine.zero_stage):
        raise ConfigError("engine.offload: cpu needs engine.name=deepspeed and engine.zero_stage of 1 to 3")
    if engine.compile and on_deepspeed and engine.zero_stage == 3:
        raise ConfigError(
            "engine.compile does not go with engine.zero_stage=3, which gathers weights layer by layer while Python "
            "runs; choose a lower stage, or engine.compile=false"
        )


def build_loss(config: LossConfig) -> losses.Loss:
    """The loss that a config names. One that wraps another takes it as ``loss``, again with a name and parameters.

    Raises:
        ConfigError: there is no such loss, it takes no such parameter, or the value is out of range.
    """
    return _build_loss("head.loss", {"name": config.name, **(config.model_extra or {})})


def _build_loss(where: str, tree: Any) -> losses.Loss:
    if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
        raise ConfigError(f"{where}: expected a loss such as {{name: arcface, margin: 0.5}}, got {tree!r}")
    options = dict(tree)
    name = options.pop("name")
    if name not in losses.BY_NAME:
        raise ConfigError(f"{where}.name: {unknown_name(name, losses.BY_NAME)}")
    kind = losses.BY_NAME[name]
    accepted = {name: parameter for name, parameter in inspect.signature(kind).parameters.items() if name != "self"}
    for option, value in options.items():
        if option not in accepted:
            raise ConfigError(f"{where}.{option}: {unknown_name(option, accepted)} of loss {name}")
        if option == "loss":
            options[option] = _build_loss(f"{where}.loss", value)
        else:
            options[option] = like_default(f"{where}.{option}", value, accepted[option].default)
    if "loss" in accepted and "loss" not in options:
        raise ConfigError(f"{where}.loss: {name} wraps another loss: give one, such as {{name: arcface}}")
    try:
        return kind(**options)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where} ({name}): {error}") from error


def build_sample_rate(head: HeadConfig, steps_per_epoch: int) -> SampleRate:
    """The sample rate that a config describes.

    Raises:
        ConfigError: rates or epochs are out of range, or do not fit each other.
    """
    rate = head.sample_rate_schedule
    if rate is None:
        return head.sample_rate
    try:
        starts = [round(epoch * steps_per_epoch) for epoch in rate.epochs]
        if rate.schedule == "steps":
            return StepRate(rate.rates, starts)
        if len(rate.rates) != 2 or len(starts) != 2 or starts[0] != 0:
            raise ConfigError(f"linear takes two rates and two epochs, the first 0, got {rate.rates} and {rate.epochs}")
        return LinearRate(rate.rates[0], rate.rates[1], starts[1])
    except ConfigError as error:
        raise ConfigError(f"head.sample_rate_schedule: {error}") from error


def build_head_optimizer(config: Config, head: PartialFC) -> RowOptimizer:
    """The head's optimizer, at the peak learning rate. Each group has its factor on it as ``lr_factor``."""
    optim = config.optim
    rows = [parameter for parameter in (head.weight, head.bias) if parameter is not None]
    groups: list[dict[str, Any]] = [{"params": rows, "lr_factor": optim.head_lr_factor}]
    # A number that a loss learns (UCE's threshold) is no row: neither decay nor the rows' learning rate suits it.
    of_loss = list(head.loss.parameters())
    if of_loss:
        groups.append({"params": of_loss, "lr_factor": 1.0, "weight_decay": 0.0})
    state_dtype = torch.bfloat16 if optim.head_state_dtype == "bfloat16" else torch.float32
    common: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    if optim.head_optimizer == "adamw":
        return RowAdamW(groups, **common, state_dtype=state_dtype)
    if optim.head_optimizer == "adagrad":
        return RowAdagrad(groups, **common)
    return RowSGD(
        groups, **common, momentum=optim.momentum, unsampled_rows=optim.unsampled_rows, state_dtype=state_dtype
    )


def build_head(
    config: Config,
    num_classes: int,
    steps_per_epoch: int = 1000,
    device: Any = None,
    on_nonfinite: Literal["raise", "propagate"] = "raise",
) -> PartialFC:
    """The head that a config describes, on this rank; ``steps_per_epoch`` is the unit of a sample rate's schedule."""
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
        memory_budget_mb=head.memory_budget_mb,
        device=device,
    )


def to_yaml(config: Config) -> str:
    """The resolved config, every key spelled out; :func:`load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key, as YAML would have it.

    Raises:
        ConfigError: there is no such key.
    """
    value: Any = config.model_dump(mode="json")
    for depth, name in enumerate(key.split(".")):
        if not isinstance(value, dict) or name not in value:
            known = value if isinstance(value, dict) else []
            raise ConfigError(f"{'.'.join(key.split('.')[: depth + 1])}: {unknown_name(name, known)}")
        value = value[name]
    return value


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"expected section.key=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from error
    *sections, key = path.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[key] = value


def _explain(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"{where}: {unknown_name(str(problem['loc'][-1]), _keys_at(problem['loc'][:-1]))}"
    given = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}{given}"


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    section: Any = Config
    for name in location:
        field = section.model_fields[name]
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(section.model_fields)
