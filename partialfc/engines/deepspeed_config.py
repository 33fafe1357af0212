"""What DeepSpeed is told: what follows from the config, and a user's own JSON where that leaves it open."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from partialfc.config import Config
from partialfc.engines.loss_scale import LossScale
from partialfc.errors import ConfigError
from partialfc.options import unknown_name

# What a file may set, besides what it repeats of the config. All else changes what the layout of the state or the
# agreement on skipped steps relies on, or would be without effect.
_OPEN = [
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "aio",
]
_OPEN_OF_ZERO = [
    "allgather_partitions",
    "allgather_bucket_size",
    "reduce_scatter",
    "reduce_bucket_size",
    "overlap_comm",
    "contiguous_gradients",
    "sub_group_size",
    "ignore_unused_parameters",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
]
_BUCKET = 50_000_000  # elements of the gradient that are averaged at once, at most; an eighth of small backbones
_WITHOUT_EFFECT = ["stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save"]  # we gather all
_OPEN_OF_SCALE = ["initial_scale_power", "loss_scale_window", "min_loss_scale"]
_NOTHING = object()
_REPEATED = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16",
    "bf16",
    "zero_optimization",
    "optimizer",
    "scheduler",
]


def deepspeed_options(config: Config, world_size: int, parameters: int) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``, for a backbone of so many ``parameters``.

    Raises:
        ConfigError: ``engine.deepspeed_config`` cannot be read, contradicts the config, or sets what is not supported.
    """
    engine = config.engine
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": _micro_batch(config, world_size),
        "gradient_accumulation_steps": config.optim.accumulation,
        "gradient_clipping": config.optim.clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
        # By itself it takes a buffer of 500 million elements, several times what most backbones have.
        "zero_optimization": {"stage": engine.zero_stage, "reduce_bucket_size": min(max(parameters // 8, 1), _BUCKET)},
    }
    if engine.offload == "cpu":
        options["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if engine.precision == "bf16":
        options["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif engine.precision == "fp16":
        options["fp16"] = {"enabled": True, "loss_scale": 1.0}  # the engine scales by itself
    if engine.deepspeed_config is not None:
        _add(options, _Given(engine.deepspeed_config), config, world_size)
    return options


def loss_scale(config: Config) -> LossScale:
    """The loss scale of fp16, with what a user's file says of it.

    Raises:
        ConfigError: as :func:`deepspeed_options`.
    """
    if config.engine.deepspeed_config is None:
        return LossScale()
    given = _Given(config.engine.deepspeed_config)
    scale = LossScale()
    power = given.number("fp16.initial_scale_power", least=0, most=math.log2(scale.most))
    if power is not None:
        scale.value = 2.0**power
    least = given.number("fp16.min_loss_scale", least=2.0**-24, most=scale.value)
    scale.least = scale.least if least is None else least
    window = given.number("fp16.loss_scale_window", least=1, whole=True)
    scale.window = scale.window if window is None else int(window)
    return scale


def _add(options: dict[str, Any], given: _Given, config: Config, world_size: int) -> None:
    """Take over what the file leaves open; refuse what contradicts the config."""
    given.only((), [*_REPEATED, *_OPEN])
    given.only(("fp16",), ["enabled", "loss_scale", "hysteresis", "consecutive_hysteresis", *_OPEN_OF_SCALE])
    given.only(("bf16",), ["enabled", "check_grad_overflow", "immediate_grad_update"])
    offload = ["offload_optimizer", "offload_param"]
    given.only(("zero_optimization",), ["stage", *offload, *_OPEN_OF_ZERO, *_WITHOUT_EFFECT])
    engine, optim, batch = config.engine, config.optim, config.data.global_batch_size
    given.same("train_batch_size", batch, "data.global_batch_size")
    micro = _micro_batch(config, world_size)
    of = f"data.global_batch_size={batch}, optim.accumulation={optim.accumulation} and {world_size} ranks"
    given.same("train_micro_batch_size_per_gpu", micro, None, f"{of} make it {micro}")
    given.same("gradient_accumulation_steps", optim.accumulation, "optim.accumulation")
    given.same("gradient_clipping", optim.clip or 0.0, "optim.clip")
    given.same("zero_optimization.stage", engine.zero_stage, "engine.zero_stage")
    for precision in ("fp16", "bf16"):
        given.same(
            f"{precision}.enabled", engine.precision == precision, None, f"engine.precision is {engine.precision}"
        )
    if engine.precision == "fp16":
        given.same("fp16.loss_scale", 0, None, "the scale is dynamic")
        given.same("fp16.hysteresis", 1, None, "every step that overflows lowers the scale, in both engines")
    if engine.precision == "bf16":
        given.same("bf16.check_grad_overflow", True, None, "a step that overflows is skipped")
    given.same("optimizer.type", optim.name, "optim.name", fold=True)
    for section, keys in (
        ("optimizer.params", "optim.lr, optim.weight_decay and optim.momentum say it"),
        ("scheduler", "optim.schedule, optim.warmup and optim.epochs say it"),
    ):
        for key in given.leaves(section):
            given.refuse(key, f'{keys}; write "auto" there or remove it', given.value(key))
    given.number("steps_per_print", least=1)
    for name in _OPEN:
        if given.holds(name):
            options[name] = given.value(name)
    zero = options["zero_optimization"]
    for name in _OPEN_OF_ZERO:
        if given.holds(f"zero_optimization.{name}"):
            zero[name] = given.value(f"zero_optimization.{name}")
    for section in offload:
        found = {key.rpartition(".")[2]: given.value(key) for key in given.leaves(f"zero_optimization.{section}")}
        if found.get("device") == "nvme":
            given.refuse(f"zero_optimization.{section}.device", "offloading goes to host memory only", "nvme")
        if section == "offload_optimizer":
            given.same("zero_optimization.offload_optimizer.device", engine.offload, "engine.offload")
        if found and (section == "offload_param" or engine.offload == "cpu"):
            zero[section] = {**zero.get(section, {}), **found}


def _micro_batch(config: Config, world_size: int) -> int:
    """Samples of a micro-batch on a rank, padding included."""
    of_all = -(-config.data.global_batch_size // config.optim.accumulation)
    return -(-of_all // world_size)


class _Given:
    """A user's file. ``"auto"`` means what the config says, as in other trainers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.tree = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"engine.deepspeed_config: cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"engine.deepspeed_config: {path} is not valid JSON: {error}") from error
        if not isinstance(self.tree, dict):
            raise ConfigError(f"engine.deepspeed_config: {path}: expected an object, got {type(self.tree).__name__}")

    def value(self, key: str) -> Any:
        """What is at a dotted key; ``"auto"`` if nothing is."""
        found: Any = self.tree
        for name in key.split("."):
            if not isinstance(found, dict) or name not in found:
                return "auto"
            found = found[name]
        return found

    def holds(self, key: str) -> bool:
        return self.value(key) != "auto"

    def number(self, key: str, least: float, most: float = math.inf, whole: bool = False) -> float | None:
        """A number at a dotted key, in that range, or none."""
        value = self.value(key)
        if value == "auto":
            return None
        fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        if not fits or (whole and value % 1):
            kind = "a whole number" if whole else "a number"
            range_ = f"from {least:g}" + ("" if most == math.inf else f" to {most:g}")
            self.refuse(key, f"expected {kind} {range_}, got {json.dumps(value)}")
        return value

    def leaves(self, key: str) -> Iterator[str]:
        """The keys below (or at) a dotted key that hold more than ``"auto"``."""
        value = self.value(key)
        if isinstance(value, dict):
            for name in value:
                yield from self.leaves(f"{key}.{name}")
        elif value != "auto":
            yield key

    def only(self, where: tuple[str, ...], names: list[str]) -> None:
        """Refuse other names in a section."""
        section: Any = self.value(".".join(where)) if where else self.tree
        if not where or section != "auto":
            if not isinstance(section, dict):
                self.refuse(".".join(where), f"expected a section, got {section!r}")
            for name in section:
                if name not in names:
                    self.refuse(".".join((*where, name)), unknown_name(name, names) + "; partialfc uses no other")

    def same(self, key: str, ours: Any, setting: str | None, why: str = "", fold: bool = False) -> None:
        """Refuse a value that is neither ``"auto"`` nor ours, which is that of the config's key ``setting``."""
        theirs = self.value(key)
        if theirs == "auto" or theirs == ours or (fold and str(theirs).lower() == ours):
            return
        why = f"{setting} is {ours}" if setting else why
        other, of_ours = "", str if isinstance(ours, str) else int | float
        if setting == "optim.clip" and not theirs:
            other = ", or set optim.clip=null"
        elif setting and isinstance(theirs, of_ours) and not isinstance(theirs, bool):
            other = f", or set {setting}={theirs}"
        self.refuse(key, f'{why}; write "auto" there or remove it{other}', theirs)

    def refuse(self, key: str, why: str, value: Any = _NOTHING) -> None:
        said = ":" if value is _NOTHING else f" is {json.dumps(value)}, but"
        raise ConfigError(f"engine.deepspeed_config: {self.path}: {key}{said} {why}")
