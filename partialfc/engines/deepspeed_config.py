"""DeepSpeed's options: those that follow from the config, and those that a user's JSON may add."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from partialfc.config import Config
from partialfc.data.order import local_share
from partialfc.engines.loss_scale import LossScale
from partialfc.errors import ConfigError
from partialfc.files import read_json
from partialfc.options import describe_unknown

_MAX_BYTES = 1 << 20  # of a JSON
_BUCKET = 50_000_000  # most gradient elements averaged at once; for a small backbone, an eighth of its elements

_OFFLOADED_OPTIMIZER, _OFFLOADED_WEIGHTS = "zero_optimization.offload_optimizer", "zero_optimization.offload_param"

# What a JSON may set, by section: these keys, and the ones that :func:`_fixed` lists, with the values there. Any other
# key would break the layout of the state or the agreement on skipped steps. Those of fp16 and bf16 are not passed on:
# the engine scales the loss itself, and the rest is common in files without an effect here.
_ALLOWED = {
    "": """communication_data_type prescale_gradients gradient_predivide_factor steps_per_print wall_clock_breakdown
        memory_breakdown dump_state flops_profiler comms_logger aio""",
    "zero_optimization": """allgather_partitions allgather_bucket_size reduce_scatter reduce_bucket_size overlap_comm
        contiguous_gradients sub_group_size ignore_unused_parameters
        stage3_prefetch_bucket_size prefetch_bucket_size
        stage3_param_persistence_threshold param_persistence_threshold
        stage3_model_persistence_threshold model_persistence_threshold
        stage3_max_live_parameters max_live_parameters
        stage3_max_reuse_distance max_reuse_distance
        stage3_gather_16bit_weights_on_model_save gather_16bit_weights_on_model_save""",
    _OFFLOADED_OPTIMIZER: """pin_memory buffer_count fast_init ratio super_offload cpuadam_cores_perc pipeline_read
        pipeline_write nvme_path""",
    _OFFLOADED_WEIGHTS: "device pin_memory buffer_count buffer_size max_in_cpu nvme_path",
    "fp16": """initial_scale_power loss_scale_window min_loss_scale
        loss_scale hysteresis consecutive_hysteresis""",
    "bf16": "check_grad_overflow immediate_grad_update",
}
_ALLOWED_KEYS = {f"{section}.{name}".removeprefix(".") for section, names in _ALLOWED.items() for name in names.split()}


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
    sections = {"": options, "zero_optimization": zero, _OFFLOADED_WEIGHTS: {}}
    if engine.offload == "cpu":
        sections[_OFFLOADED_OPTIMIZER] = zero["offload_optimizer"]
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if key in _ALLOWED_KEYS and section in sections:
            sections[section][name] = value
    if sections[_OFFLOADED_WEIGHTS]:
        zero["offload_param"] = sections[_OFFLOADED_WEIGHTS]
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
        expected, reason = fixed.get(key, (value, ""))
        if value == "nvme":
            reason = "offloading goes to host memory only"
        elif _equal(value, expected):
            continue
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
        f"{_OFFLOADED_OPTIMIZER}.device": (engine.offload, f"engine.offload is {engine.offload}"),
        "fp16.enabled": (engine.precision == "fp16", precision),
        "bf16.enabled": (engine.precision == "bf16", precision),
        "optimizer.type": (optim.name, f"optim.name is {optim.name}"),
        "optimizer.params.lr": (optim.lr, f"optim.lr is {optim.lr}"),
        "optimizer.params.weight_decay": (optim.weight_decay, f"optim.weight_decay is {optim.weight_decay}"),
        "optimizer.params.momentum": (optim.momentum, f"optim.momentum is {optim.momentum}"),
        "scheduler.type": (None, "optim.schedule, optim.warmup and optim.epochs set it"),
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
    """Return the most samples of a micro-batch on a rank."""
    return local_share(config.data.global_batch_size, config.optim.accumulation, world_size)


def _read(config: Config) -> dict[str, Any]:
    """Return the settings of the user's JSON by dotted key; ``"auto"`` counts as absent."""
    path = config.engine.deepspeed_config
    if path is None:
        return {}
    try:
        tree = read_json(path, _MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"engine.deepspeed_config: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed_config: {path} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise _refusal(config, f"expected an object, got {type(tree).__name__}")
    return dict(_settings(config, _without_auto(tree), {*_fixed(config), *_ALLOWED_KEYS}))


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section without the values that are ``"auto"``, and without the sections that hold nothing else."""
    found = {name: _without_auto(value) if isinstance(value, dict) else value for name, value in section.items()}
    return {name: value for name, value in found.items() if value != "auto" and (value != {} or not section[name])}


def _settings(config: Config, section: dict[str, Any], known: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings below a dotted ``prefix``; refuse unknown keys."""
    names = {key.removeprefix(prefix).partition(".")[0] for key in known if key.startswith(prefix)}
    for name, value in section.items():
        key = f"{prefix}{name}"
        if name not in names:
            raise _refusal(config, f"{key}: {describe_unknown(name, sorted(names))}; partialfc uses no other")
        if key in known:
            yield key, value
        elif isinstance(value, dict):
            yield from _settings(config, value, known, f"{key}.")
        else:
            raise _refusal(config, f"{key}: expected a section, got {value!r}")


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
