"""DeepSpeed's options: those that follow from the config, and those that a user's JSON may add."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from partialfc.config import Config
from partialfc.engines.loss_scale import LossScale
from partialfc.errors import ConfigError
from partialfc.options import describe_unknown

_BUCKET = 50_000_000  # most gradient elements averaged at once; for a small backbone, an eighth of its elements

# Keys that a JSON may set, besides those of :func:`_fixed` with the values there and those of the loss scale. Any other
# key would break the layout of the state or the agreement on skipped steps, or have no effect.
_PASSED_ON = {
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
    "zero_optimization.allgather_partitions",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.reduce_scatter",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.sub_group_size",
    "zero_optimization.ignore_unused_parameters",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_model_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.prefetch_bucket_size",
    "zero_optimization.param_persistence_threshold",
    "zero_optimization.model_persistence_threshold",
    "zero_optimization.max_live_parameters",
    "zero_optimization.max_reuse_distance",
}
_OF_LOSS_SCALE = {"fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.min_loss_scale"}
_IGNORED = {  # common in files, without effect here
    "fp16.loss_scale",
    "fp16.hysteresis",
    "fp16.consecutive_hysteresis",
    "bf16.check_grad_overflow",
    "bf16.immediate_grad_update",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.gather_16bit_weights_on_model_save",
}
# Sections with keys of any name: DeepSpeed checks those of the first two; the others may hold only "auto".
_OPEN_SECTIONS = {
    "zero_optimization.offload_optimizer": "",
    "zero_optimization.offload_param": "",
    "optimizer.params": "optim.lr, optim.weight_decay and optim.momentum set it",
    "scheduler": "optim.schedule, optim.warmup and optim.epochs set it",
}


def deepspeed_options(config: Config, world_size: int, parameters: int) -> dict[str, Any]:
    """Return the options for ``deepspeed.initialize``, for a backbone of this number of ``parameters``.

    Raises:
        ConfigError: ``engine.deepspeed_config`` cannot be read, contradicts the config, or sets an unsupported option.
    """
    engine = config.engine
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        # DeepSpeed's default buffer has 500 million elements, several times as many as most backbones.
        "reduce_bucket_size": min(max(parameters // 8, 1), _BUCKET),
    }
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": _micro_batch(config, world_size),
        "gradient_accumulation_steps": config.optim.accumulation,
        "gradient_clipping": config.optim.clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
        "zero_optimization": zero,
    }
    if engine.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.precision == "bf16":
        options["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif engine.precision == "fp16":
        options["fp16"] = {"enabled": True, "loss_scale": 1.0}  # the engine scales the loss itself
    settings = _read(config)
    _check(config, settings, world_size)
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if key in _PASSED_ON:
            (zero if section else options)[name] = value
        elif section == "zero_optimization.offload_param":
            zero.setdefault("offload_param", {})[name] = value
        elif section == "zero_optimization.offload_optimizer" and engine.offload == "cpu":
            zero["offload_optimizer"][name] = value
    return options


def loss_scale(config: Config) -> LossScale:
    """Return the loss scale of fp16, with the values that a user's JSON sets.

    Raises:
        ConfigError: the JSON cannot be read, or a value is out of range.
    """
    scale, settings = LossScale(), _read(config)
    power = _number(config, settings, "fp16.initial_scale_power", math.log2(scale.value), 0, math.log2(scale.most))
    scale.value = 2.0**power
    scale.least = _number(config, settings, "fp16.min_loss_scale", scale.least, 2.0**-24, scale.value)
    scale.window = int(_number(config, settings, "fp16.loss_scale_window", scale.window, 1, whole=True))
    return scale


def _check(config: Config, settings: dict[str, Any], world_size: int) -> None:
    """Refuse settings that contradict the config."""
    _number(config, settings, "steps_per_print", 1, 1)
    fixed = _fixed(config, world_size)
    for key, value in settings.items():
        reason = next((why for section, why in _OPEN_SECTIONS.items() if f"{key}.".startswith(f"{section}.")), "")
        if value == "nvme":
            reason = "offloading goes to host memory only"
        elif key in fixed:
            expected, why = fixed[key]
            reason = "" if _equal(value, expected) else why
        if reason:
            raise _refusal(config, f'{key} is {json.dumps(value)}, but {reason}; write "auto" there or remove it')


def _fixed(config: Config, world_size: int = 1) -> dict[str, tuple[Any, str]]:
    """Return the keys that follow from the config: the only value that a JSON may give, and the reason to show."""
    engine, optim, batch = config.engine, config.optim, config.data.global_batch_size
    micro = _micro_batch(config, world_size)
    sizes = f"data.global_batch_size={batch}, optim.accumulation={optim.accumulation} and {world_size} ranks"
    precision = f"engine.precision is {engine.precision}"
    fixed: dict[str, tuple[Any, str]] = {
        "train_batch_size": (batch, f"data.global_batch_size is {batch}"),
        "train_micro_batch_size_per_gpu": (micro, f"{sizes} make it {micro}"),
        "gradient_accumulation_steps": (optim.accumulation, f"optim.accumulation is {optim.accumulation}"),
        "gradient_clipping": (optim.clip or 0.0, f"optim.clip is {optim.clip}"),
        "zero_optimization.stage": (engine.zero_stage, f"engine.zero_stage is {engine.zero_stage}"),
        "zero_optimization.offload_optimizer.device": (engine.offload, f"engine.offload is {engine.offload}"),
        "fp16.enabled": (engine.precision == "fp16", precision),
        "bf16.enabled": (engine.precision == "bf16", precision),
        "optimizer.type": (optim.name, f"optim.name is {optim.name}"),
    }
    if engine.precision == "fp16":
        fixed["fp16.loss_scale"] = (0, "the scale is dynamic")
        fixed["fp16.hysteresis"] = (1, "every step that overflows lowers the scale, under each engine")
    if engine.precision == "bf16":
        fixed["bf16.check_grad_overflow"] = (True, "a step that overflows is skipped")
    return fixed


def _equal(value: Any, expected: Any) -> bool:
    if isinstance(value, str) and isinstance(expected, str):
        return value.lower() == expected
    return bool(value == expected)


def _micro_batch(config: Config, world_size: int) -> int:
    """Return the samples of a micro-batch per rank, padding included."""
    of_all_ranks = -(-config.data.global_batch_size // config.optim.accumulation)
    return -(-of_all_ranks // world_size)


def _read(config: Config) -> dict[str, Any]:
    """Return the settings of the user's JSON by dotted key; ``"auto"`` counts as absent."""
    path = config.engine.deepspeed_config
    if path is None:
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"engine.deepspeed_config: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed_config: {path} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise _refusal(config, f"expected an object, got {type(tree).__name__}")
    known = {*_fixed(config), *_PASSED_ON, *_OF_LOSS_SCALE, *_IGNORED, *_OPEN_SECTIONS}
    return dict(_settings(config, tree, known))


def _settings(config: Config, section: dict[str, Any], known: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings below a dotted ``prefix``; refuse unknown keys."""
    names = {key.removeprefix(prefix).partition(".")[0] for key in known if key.startswith(prefix)}
    is_open = any(prefix.startswith(f"{section}.") for section in _OPEN_SECTIONS)
    for name, value in section.items():
        key = f"{prefix}{name}"
        if name not in names and not is_open:
            raise _refusal(config, f"{key}: {describe_unknown(name, sorted(names))}; partialfc uses no other")
        if isinstance(value, dict) and (key not in known or key in _OPEN_SECTIONS):
            yield from _settings(config, value, known, f"{key}.")
        elif key not in known and not is_open and value != "auto":
            raise _refusal(config, f"{key}: expected a section, got {value!r}")
        elif value != "auto":
            yield key, value


def _number(
    config: Config,
    settings: dict[str, Any],
    key: str,
    default: float,
    least: float,
    most: float = math.inf,
    whole: bool = False,
) -> float:
    """Return the number at ``key``; refuse one that is out of range."""
    value = settings.get(key, default)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not fits or (whole and value % 1):
        kind = "a whole number" if whole else "a number"
        limits = f"from {least:g}" + ("" if most == math.inf else f" to {most:g}")
        raise _refusal(config, f"{key}: expected {kind} {limits}, got {json.dumps(value)}")
    return value


def _refusal(config: Config, message: str) -> ConfigError:
    return ConfigError(f"engine.deepspeed_config: {config.engine.deepspeed_config}: {message}")
