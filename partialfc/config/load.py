"""Config loading: YAML, then overrides from the command line, then validation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from partialfc import models
from partialfc.config.keys import section_of, type_at
from partialfc.config.objects import build_loss, build_sample_rate
from partialfc.config.reading import dump_yaml, read_value, read_yaml
from partialfc.config.schema import Config, EngineConfig
from partialfc.errors import ConfigError
from partialfc.options import describe_unknown, shorten


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as ``optim.lr=0.2``.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, of the wrong type or out of range.
    """
    tree = read_yaml(Path(path), Config)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `data:`, got {type(tree).__name__}")
    given: dict[str, str] = {}
    for override in overrides:
        _apply_override(tree, override, given)
    config = parse_config(tree)
    _check_run(config)
    return config


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a tree of plain values.

    Raises:
        ConfigError: a key is unknown, of the wrong type or out of range, or two are incompatible.
    """
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
    """Compare the data set's number of classes with ``data.num_classes``, if that is set.

    Raises:
        ConfigError: they differ.
    """
    expected = config.data.num_classes
    if expected not in (None, found):
        raise ConfigError(f"data.num_classes: {expected:,} expected, and data.train has {found:,}")


def _check_run(config: Config) -> None:
    """Refuse what no run should begin with. (A checkpoint of such a run may still be evaluated.)"""
    optim, budget = config.optim, config.head.memory_budget_mb
    if optim.warmup > optim.epochs:
        raise ConfigError(
            f"optim.warmup: {optim.warmup:g} epochs of warm-up are longer than the run, optim.epochs={optim.epochs:g}; "
            "lower optim.warmup (0 for none), or raise optim.epochs"
        )
    if budget < 1:
        raise ConfigError(
            f"head.memory_budget_mb: expected at least 1 MiB, got {budget:g}; less costs speed and saves nothing"
        )


def _check_engine(engine: EngineConfig) -> None:
    on_deepspeed = engine.name == "deepspeed"
    if engine.deepspeed_config is not None and not on_deepspeed:
        raise ConfigError("engine.deepspeed_config needs engine.name=deepspeed")
    if engine.offload == "cpu" and not (on_deepspeed and engine.zero_stage):
        raise ConfigError("engine.offload: cpu needs engine.name=deepspeed and engine.zero_stage of 1 to 3")
    if engine.compile and on_deepspeed and engine.zero_stage == 3:
        raise ConfigError(
            "engine.compile is incompatible with engine.zero_stage=3, which gathers weights layer by layer in Python "
            "hooks; choose a lower stage, or engine.compile=false"
        )


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML, with every key; :func:`load_config` reads it back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def value_of(config: Config, key: str) -> Any:
    """Return the value at a dotted key, as plain YAML types.

    Raises:
        ConfigError: the key is unknown.
    """
    value: Any = config.model_dump(mode="json")
    for depth, name in enumerate(key.split(".")):
        if not isinstance(value, dict) or name not in value:
            known = value if isinstance(value, dict) else []
            raise ConfigError(f"{'.'.join(key.split('.')[: depth + 1])}: {describe_unknown(name, known)}")
        value = value[name]
    return value


def _apply_override(tree: dict[str, Any], override: str, given: dict[str, str]) -> None:
    """Put a value into the tree.

    Args:
        given: the override that each key of earlier ones came from; this one's are added.

    Raises:
        ConfigError: it is malformed, or would replace an earlier override.
    """
    path, separator, text = override.partition("=")
    names = path.split(".")
    if not separator or not all(names):
        raise ConfigError(f"expected section.key=value, got {shorten(override)}")
    value = read_value(path, text, type_at(Config, names))
    keys = _leaves(path, value)
    for key, earlier in given.items():
        if _is_below(key, path) or any(_is_below(new, key) for new in keys):
            both = f"{shorten(earlier)} and {shorten(override)}"
            raise ConfigError(f"{key}: given twice on the command line, {both}; keep one of them")
    given |= dict.fromkeys(keys, override)
    for depth, section in enumerate(names[:-1]):
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(names[: depth + 1])}: expected a section, got {shorten(tree)}")
    tree[names[-1]] = value


def _leaves(path: str, value: Any) -> list[str]:
    """Return the dotted keys of the values in ``value``."""
    if not isinstance(value, dict) or not value:
        return [path]
    return [key for name, child in value.items() for key in _leaves(f"{path}.{name}", child)]


def _is_below(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def _explain(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"{where}: {describe_unknown(str(problem['loc'][-1]), _keys_at(problem['loc'][:-1]))}"
    given = "" if problem["type"] == "missing" else f", got {shorten(problem['input'])}"
    message = problem["msg"].replace(" for <class 'pathlib.Path'>", "")
    return f"{where}: {message[0].lower()}{message[1:]}{given}"


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    section = section_of(type_at(Config, [str(name) for name in location]))
    return list(section.model_fields) if section else []
